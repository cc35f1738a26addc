# Two commands on a fresh machine: `make demo` and `make test`. Both make the environment first; `make` lists the rest.
#
# Variables: PYTHON=/path/to/python  EXTRAS=dev,metal  VENV=.venv  CONSTRAINTS=.ci/constraints/X.txt  JOBS=2

SHELL := /bin/bash
VENV ?= .venv
PYTHON ?=
EXTRAS ?=
CONSTRAINTS ?=
JOBS ?= 2
PYTEST_ARGS ?=
PY := $(VENV)/bin/python
PYTEST = $(PY) -m pytest -q -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

DEMO := experiments/tales

.PHONY: help env demo test test-slow test-faults test-core interop-env test-interop test-clients test-cluster lint \
	readme-blocks clean
.DEFAULT_GOAL := help

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: ## make or update the environment .venv, with the best Python found
	@VENV='$(VENV)' PYTHON='$(PYTHON)' EXTRAS='$(EXTRAS)' CONSTRAINTS='$(CONSTRAINTS)' .ci/make-env

demo: env ## train a small model on the embedded tales, let it tell some, and write a report
	@$(PY) launch/prepare.py --config=configs/tales.py --workdir=$(DEMO)
	@$(PY) launch/train.py --config=configs/tales.py --workdir=$(DEMO)
	@$(PY) launch/evaluate.py --workdir=$(DEMO)
	@$(PY) launch/report.py --workdir=$(DEMO)
	@$(PY) launch/sample.py --workdir=$(DEMO) --prompt='Once' --max_tokens=200 --temperature=0.7 --num_samples=3
	@echo
	@echo 'Everything lies in $(DEMO): open $(DEMO)/report.html for the curves and the samples.'

test: lint ## ruff, pyright and the quick tests
	@$(PYTEST)

test-slow: env ## the tests that take longer
	@$(PYTEST) -m 'slow and not hub and not faults and not cluster'

test-faults: env ## kills, signals and damage, with real processes (FAULTS=5: 50 kills, 200 corruptions)
	@$(PYTEST) -m faults tests/faults

test-core: env ## the quick tests without the launch scripts, for another set of versions (VENV, PYTHON, CONSTRAINTS)
	@$(PYTEST) --ignore=tests/launch --ignore=tests/test_house.py

# llama.cpp is built from its sources, some six minutes on two cores the first time; not for this very processor, for a
# virtual machine may name instructions that it cannot execute. pip does not tell builds with other flags apart, so what
# is built with these has a cache of its own.
interop-env: ## the environment of test-interop, .venv-interop: transformers 4 and 5, PEFT, torch, llama.cpp
	@python=$$(.ci/find-python 3.11) && VENV=.venv-interop PYTHON="$$python" EXTRAS=dev,eval,interop \
	    CMAKE_ARGS='-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF' PIP_CACHE_DIR="$$HOME/.cache/tale_jax/pip-any-processor" \
	    CONSTRAINTS=.ci/constraints/interop.txt .ci/make-env
	@.venv-interop/bin/python -m pip install -q --no-input --disable-pip-version-check --no-deps --upgrade \
	    --target .venv-interop/transformers4 -r .ci/constraints/transformers4.txt

test-interop: interop-env ## exported and imported models beside transformers 4 and 5, PEFT and llama.cpp
	@.venv-interop/bin/python -m pytest -q -n $(JOBS) --dist loadfile -m interop $(PYTEST_ARGS) tests/interop

test-clients: ## the server with OpenAI's client, schemathesis and, where it is on PATH, Chromium, in .venv-clients
	@EXTRAS=dev,clients VENV=.venv-clients PYTHON='$(PYTHON)' .ci/make-env
	@.venv-clients/bin/python -m pytest -q -m 'browser or clients' $(PYTEST_ARGS) tests/serve

# As root, with Debian's slurm-wlm, munge, openmpi-bin, openssh-server, iproute2 and shellcheck; what is missing is skipped.
test-cluster: ## launch/cluster with real Slurm, Open MPI and Ray, and the manifests of Kubernetes, in .venv-cluster
	@EXTRAS=dev,ray,cluster VENV=.venv-cluster PYTHON='$(PYTHON)' .ci/make-env
	@.venv-cluster/bin/python -m pytest -q -m cluster $(PYTEST_ARGS) tests/cluster tests/runs/test_processes.py

lint: env ## ruff and pyright
	@$(PY) -m ruff check .
	@$(PY) -m pyright --pythonpath $(PY)

readme-blocks: env ## run what the README files show output of (after make demo), and put its numbers in
	@$(PY) tests/readme_blocks.py

clean: ## remove the environments and caches, never the experiments
	@rm -rf .venv .venv-* .pytest_cache .ruff_cache .hypothesis dist build *.egg-info
	@find . -path ./experiments -prune -o -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
