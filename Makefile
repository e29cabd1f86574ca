# Everything runs from .venv, which the first target that needs it creates.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Two workers with one thread each; more threads only make them wait for each other.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
CODE := $(wildcard qlip_export tests tools benchmarks)

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow test-gpu lint format bench docs emoji-data emoji-train build clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -e ".[export,openvino,onnxruntime,validate,report,demo,docs,dev]" -c constraints.txt
	$(BIN)/python -m pip install --no-deps tensorrt-stubs -c constraints.txt
	$(BIN)/python tools/tensorrt_stubs.py
	touch $@

install: $(INSTALLED) ## create .venv with the pinned dependencies

quickstart: install ## build the embedded emoji model, draw a dozen prompts, validate
	$(BIN)/qlip-export quickstart

test: install ## the fast tests
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-slow: install ## the tests that take more than ten seconds each
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -m "slow and not gpu"

test-gpu: install ## the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu

lint: install ## ruff and mypy
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: install ## let ruff rewrite what it can
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench: install ## measure engines on this machine
	$(BIN)/python -m benchmarks

docs: install ## the documentation as a site in build/site; a broken link is an error
	$(BIN)/python -m mkdocs build --strict

emoji-data: install ## render the training images of the emoji model, write its prompt files
	$(BIN)/python -m tools.emoji.data
	$(BIN)/python -m tools.emoji.prompts

emoji-train: install ## train the emoji model again, on one or more NVIDIA GPUs
	PYTHON=$(BIN)/python tools/emoji/train_all.sh

build: install ## sdist and wheel in dist/
	$(BIN)/python -m build

clean: ## remove what the targets above made, .venv excepted
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis benchmarks/out
	find qlip_export tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
