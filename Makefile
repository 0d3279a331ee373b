# Everything a fresh clone needs: `make demo` and `make test`. Needs Python 3.11 or later and a package registry.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One torch thread a process: spinning threads on shared cores cost many times what they bring.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
PYTEST := $(BIN)/python -m pytest
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test lint types unit test-slow bench install clean

help:
	@echo "make demo       three experts of a real model trained in a federation, one gateway, measured (runs/demo)"
	@echo "make test       style, types and tests"
	@echo "make test-slow  the long tests: 200 crashes, real base model, real downloads"
	@echo "make bench      the benchmarks, results in benchmarks/results"
	@echo "make install    the environment alone (.venv)"

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "FedMoE needs Python 3.11 or later; run: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[worker,charts]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(INSTALL) --editable '.[dev]'
	@touch $@

install: $(VENV)/.dev

demo: $(VENV)/.demo
	env -u OMP_NUM_THREADS $(BIN)/fedmoe demo $(DEMO_FLAGS)

test: lint types unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev
	$(PYTEST)

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_recompress.py
	$(BIN)/python benchmarks/bench_coordinator.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
