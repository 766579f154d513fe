# Everything a person needs, each target alone and in any order, on a bare Debian with python3,
# python3-venv, make and git. `make help` lists the targets.
VENV        ?= .venv
PYTHON      ?= python3
TORCH_INDEX ?=
METHOD      ?= all
PRESET      ?= tiny
SEEDS       ?= 0
ARGS        ?=

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
BIN   := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
# One thread per process: the processes are the parallelism, and two busy threads on a shared core
# can be many times slower than one.
export OMP_NUM_THREADS ?= 1
export PATH := $(BIN):$(PATH)

.PHONY: help setup book test run bench notebooks docs lab clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(STAMP) ## virtual environment with everything pinned by constraints.txt

$(STAMP): constraints.txt settings.ini setup.py pyproject.toml
	@$(PYTHON) tools/check_python.py
	@echo "[setup] virtual environment in $(VENV) ($$($(PYTHON) --version))"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[setup] PyTorch (choose another build with TORCH_INDEX=address, see README)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)" 2>&1 | { grep -v '^WARNING' || true; }
	@echo "[setup] the other libraries (one to three minutes)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[all,dev,peers]" 2>&1 | { grep -v '^WARNING' || true; }
	@$(BIN)/python -c "import torch, trajbook" && touch $(STAMP)
	@echo "[setup] done"

book: setup ## run every method at the tiny preset and print the headline numbers
	@trajbook run all --preset tiny --name book --update

test: setup ## clean and export change nothing, ruff, nbdev_test, pytest
	@$(BIN)/python tools/check_clean.py
	@echo "[test] ruff"
	@ruff check -q . && ruff format --check -q .
	@echo "[test] every notebook (nbdev_test)"
	@TQDM_DISABLE=1 nbdev_test --n_workers 2 --timing
	@echo "[test] pytest"
	@TQDM_DISABLE=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder $(ARGS)

run: setup ## make run METHOD=mae PRESET=small SEEDS=0,1,2
	@trajbook run $(METHOD) --preset $(PRESET) --seeds $(SEEDS) $(ARGS)

bench: setup ## speed ratios of a method on this machine
	@trajbook bench $(if $(filter all,$(METHOD)),mae,$(METHOD)) $(ARGS)

notebooks: setup ## run every notebook and store its outputs
	@$(BIN)/python tools/notebooks.py $(ARGS)

docs: setup ## the site, in _docs/
	@$(BIN)/python tools/docs.py

lab: setup ## JupyterLab in nbs/
	@$(BIN)/jupyter lab --notebook-dir=nbs

clean: ## remove what can be made again (not runs/, not the virtual environment)
	rm -rf _proc _docs build *.egg-info .pytest_cache .ruff_cache .hypothesis data/generated
