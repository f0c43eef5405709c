PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

TRITON := 3.6.0
TORCH := 2.11.0

.PHONY: demo test test-triton families lint bench bench-report clean

# Built once; again whenever pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --progress-bar off -e ".[dev,pinned]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/saerl sae train --config examples/demo.yaml
	$(BIN)/saerl score --config examples/demo.yaml
	$(BIN)/saerl plan --config examples/demo.yaml
	$(BIN)/saerl compare --config examples/demo.yaml

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q

# The kernels under another Triton: make test-triton TRITON=3.8.0 TORCH=2.14.0. NumPy 2.4 breaks 3.6's interpreter.
test-triton:
	$(PYTHON) -m venv $(VENV)-triton-$(TRITON)
	$(VENV)-triton-$(TRITON)/bin/pip install --quiet "torch==$(TORCH)" "numpy<2.4" scipy numba pytest hypothesis
	$(VENV)-triton-$(TRITON)/bin/pip install --quiet --no-deps "triton==$(TRITON)"
	$(VENV)-triton-$(TRITON)/bin/python -m pytest -q tests/test_chunked.py tests/test_encode.py \
		tests/test_topk.py tests/test_decode.py tests/test_pool.py tests/test_compile.py

# Every family of causal language models in the installed transformers, tiny and random.
families: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python -m tests.families --out benchmarks/results/families.json

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy saerl_fast kernels/torch-ext/saerl_kernels

bench: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python -m benchmarks.run_all

bench-report: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python -m benchmarks.report

clean:
	rm -rf $(VENV) $(VENV)-triton-* build *.egg-info
