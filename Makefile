PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

TRITON := 3.6.0
TORCH := 2.11.0

.DEFAULT_GOAL := help
.PHONY: help demo test test-triton families lint format docs bench bench-report clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

# Built once; again whenever pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --progress-bar off -e ".[dev,pinned]"
	touch $@

demo: $(VENV)/.installed ## the whole pipeline on a tiny shipped model, in minutes on two CPU cores
	$(BIN)/saerl sae train --config examples/demo.yaml
	$(BIN)/saerl score --config examples/demo.yaml
	$(BIN)/saerl plan --config examples/demo.yaml
	$(BIN)/saerl compare --config examples/demo.yaml

test: $(VENV)/.installed ## the whole test suite; kernels run in Triton's interpreter where there is no GPU
	$(BIN)/python -m pytest -q

# NumPy 2.4 breaks 3.6's interpreter.
test-triton: ## the kernels' tests under another Triton: TRITON=3.8.0 TORCH=2.14.0
	$(PYTHON) -m venv $(VENV)-triton-$(TRITON)
	$(VENV)-triton-$(TRITON)/bin/pip install --quiet "torch==$(TORCH)" "numpy<2.4" scipy numba pytest hypothesis
	$(VENV)-triton-$(TRITON)/bin/pip install --quiet --no-deps "triton==$(TRITON)"
	$(VENV)-triton-$(TRITON)/bin/python -m pytest -q tests/test_chunked.py tests/test_encode.py \
		tests/test_topk.py tests/test_decode.py tests/test_pool.py tests/test_compile.py

families: $(VENV)/.installed ## every family of language models in transformers, tiny and random: is it right here?
	PYTHONPATH=. $(BIN)/python -m tests.families --out benchmarks/results/families.json

lint: $(VENV)/.installed ## ruff, ruff format and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy saerl_fast kernels/torch-ext/saerl_kernels

format: $(VENV)/.installed ## the same, mending what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --progress-bar off -e ".[docs]"
	touch $@

docs: $(VENV)/.docs ## the site with the API reference in build/docs; a warning is an error
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.installed ## every measurement in benchmarks/
	PYTHONPATH=. $(BIN)/python -m benchmarks.run_all

bench-report: $(VENV)/.installed ## the tables of benchmarks/README.md from the measurements
	PYTHONPATH=. $(BIN)/python -m benchmarks.report

clean: ## remove the environments and what was built
	rm -rf $(VENV) $(VENV)-triton-* build *.egg-info
