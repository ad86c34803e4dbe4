# What a developer types. PYTHON is the interpreter that makes the virtual environment; VENV is where it stands.
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.headstart-installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := help
.PHONY: help install test quick check format docs demo soak bench gpu clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

install: $(INSTALLED) ## make the virtual environment

# A bare Debian has venv without ensurepip: the environment is then made without pip and filled by the system's.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || $(PYTHON) -m venv --clear --without-pip $(VENV)
	if $(BIN)/python -m pip --version > /dev/null 2>&1; then $(BIN)/python -m pip install -q -e '.[dev]'; \
	else $(PYTHON) -m pip --python $(BIN)/python install -q -e '.[dev]'; fi
	touch $@

test: $(INSTALLED) ## run the whole suite
	$(BIN)/python -m pytest -q -n auto

quick: $(INSTALLED) ## run the suite without the slow tests
	$(BIN)/python -m pytest -q -n auto -m 'not slow'

check: $(INSTALLED) ## formatting, lint, types, direction of imports, generated pages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tools/cli_docs.py --check
	$(BIN)/python tools/api_docs.py --check
	$(BIN)/python tools/notebooks.py --check
	$(BIN)/python -m pytest -q tests/test_imports.py

format: $(INSTALLED) ## put the code into its form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED) ## write the generated pages and notebooks
	$(BIN)/python tools/cli_docs.py
	$(BIN)/python tools/api_docs.py
	$(BIN)/python tools/notebooks.py

demo: $(INSTALLED) ## transfer between scanned digits in two minutes, without network
	$(BIN)/headstart demo

soak: $(INSTALLED) ## read thousands of mutated pictures and model files, kill fits five hundred times
	$(BIN)/python tools/soak.py pictures --n 10000
	$(BIN)/python tools/soak.py models --n 20000
	$(BIN)/python tools/kills.py --n 500

MEASURED = step kernels profile_fit frozen_pass stored_features size stores views head checkpointing

bench: $(INSTALLED) ## train with other tools beside this one (hours; pictures and weights in HEADSTART_SHARED)
	$(BIN)/python benchmarks/peers.py run
	for script in $(MEASURED); do $(BIN)/python benchmarks/$$script.py run || exit 1; done
	for script in peers $(MEASURED); do \
	$(BIN)/python benchmarks/$$script.py table --write > /dev/null || exit 1; done

gpu: $(INSTALLED) ## on a machine with a CUDA GPU: what is tested and timed there alone (a quarter of an hour)
	$(BIN)/python -m pytest -q tests/test_gpu.py
	$(BIN)/python benchmarks/gpu.py run --no-compile
	$(BIN)/python benchmarks/gpu.py run --parts frozen,step
	$(BIN)/python benchmarks/gpu.py table --write > /dev/null

clean: ## remove the virtual environment and all caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
