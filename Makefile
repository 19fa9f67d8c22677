# Two commands matter: `make serve` answers questions from the bundled demo model, `make test` runs every test.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PORT   ?= 8080
MODEL  ?=

.DEFAULT_GOAL := help
.PHONY: help serve test test-all lint types layers check bench measure report lock clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

serve: $(VENV)/serve.stamp ## convert, quantise and serve the demo model on port $(PORT)
	@exec $(BIN)/edge-phi3 serve $(MODEL) --port $(PORT)

test: $(VENV)/dev.stamp ## run the whole test suite
	$(BIN)/pytest $(PYTEST_ARGS)

test-all: test ## and what takes longer: random lives and requests by the thousand, and comparisons with llama.cpp and torch
	$(BIN)/python -m tests.support.fuzz --scenarios 50000 --real-thread 500
	$(BIN)/python -m tests.support.service_fuzz --requests 2000
	$(BIN)/python -m tests.support.peers
	$(BIN)/pytest -m 'parity or soak' $(PYTEST_ARGS)

lint: $(VENV)/dev.stamp ## lint, and check the format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp ## type-check the package
	$(BIN)/mypy

layers: $(VENV)/dev.stamp ## check which module may import which
	$(BIN)/lint-imports

check: lint types layers ## everything but the tests

bench: $(VENV)/dev.stamp ## run the benchmark suites
	$(BIN)/pytest benchmarks $(PYTEST_ARGS)

measure: $(VENV)/dev.stamp ## measure all that docs/benchmarks.md shows again, and make it
	$(BIN)/python -m benchmarks.measure $(MEASURE_ARGS)

report: $(VENV)/dev.stamp ## make docs/benchmarks.md from the recorded results
	$(BIN)/python -m benchmarks.report

lock: ## pin anew every version of a development machine (needs uv)
	uv pip compile --universal --python-version 3.11 --extra dev --extra bench --no-emit-index-url \
	  --no-header --no-annotate --upgrade --quiet pyproject.toml -o requirements.lock

clean: ## remove the virtual environment and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .benchmarks dist

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edge-phi3 needs Python 3.11 or newer; say make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

# The lock file constrains what the extras ask for, so that two machines get the same tree. The first
# installation compiles llama.cpp (minutes); pip keeps the wheel for the next one.
$(VENV)/serve.stamp: pyproject.toml requirements.lock | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c requirements.lock -e .
	@touch $@

$(VENV)/dev.stamp: pyproject.toml requirements.lock | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@ $(VENV)/serve.stamp
