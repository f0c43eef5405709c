PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench bench-report clean

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

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy saerl_fast kernels/torch-ext/saerl_kernels

bench: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python -m benchmarks.run_all

bench-report: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python -m benchmarks.report

clean:
	rm -rf $(VENV) build *.egg-info
