# The two main commands: `make serve` serves the bundled demo model, `make test` runs every test.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PORT   ?= 8080
MODEL  ?=

.DEFAULT_GOAL := help
PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile

.PHONY: help serve test test-all coverage lint types layers check bench measure report lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

serve: $(VENV)/serve.stamp ## convert, quantise and serve the demo model on port $(PORT)
	@exec $(BIN)/edge-phi3 serve $(MODEL) --port $(PORT)

test: $(VENV)/dev.stamp ## run the whole test suite, in two processes
	$(PYTEST) $(PYTEST_ARGS)

test-all: test ## run the suite and the long tests: random lives and requests by the thousand, comparisons with llama.cpp and torch
	$(BIN)/python -m tests.support.fuzz --scenarios 50000 --real-thread 500
	$(BIN)/python -m tests.support.service_fuzz --requests 2000
	$(BIN)/python -m tests.support.peers
	$(PYTEST) -m 'parity or soak' $(PYTEST_ARGS)

coverage: $(VENV)/dev.stamp ## run the suite and report which lines of edge_phi3 it reaches, in this process and its children
	$(BIN)/coverage run -m pytest $(PYTEST_ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --sort=cover

lint: $(VENV)/dev.stamp ## lint and check the formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp ## type-check the package
	$(BIN)/mypy

layers: $(VENV)/dev.stamp ## check which modules import which
	$(BIN)/lint-imports

check: lint types layers ## run lint, types and layers

bench: $(VENV)/dev.stamp ## run the benchmark suites
	$(BIN)/pytest benchmarks $(PYTEST_ARGS)

measure: $(VENV)/dev.stamp ## repeat every measurement in docs/benchmarks.md and rebuild it
	$(BIN)/python -m benchmarks.measure $(MEASURE_ARGS)

report: $(VENV)/dev.stamp ## rebuild docs/benchmarks.md from the recorded results
	$(BIN)/python -m benchmarks.report

lock: ## update the pinned versions in requirements.lock (needs uv)
	uv pip compile --universal --python-version 3.11 --extra dev --extra bench --no-emit-index-url \
	  --no-header --no-annotate --upgrade --quiet pyproject.toml -o requirements.lock
	uv pip compile --universal --python-version 3.11 --extra otel --no-emit-index-url --generate-hashes -c requirements.lock \
	  --no-header --no-annotate --quiet pyproject.toml -o requirements-image.lock
	printf '%s\n' hatchling 'scikit-build-core[pyproject]' cmake ninja | uv pip compile --universal --python-version 3.11 \
	  --no-emit-index-url --generate-hashes --no-header --no-annotate --upgrade --quiet - -o requirements-build.lock

clean: ## remove the virtual environment and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .benchmarks dist

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edge-phi3 needs Python 3.11, 3.12 or 3.13; run make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

# The lock file constrains what the extras ask for, so that two machines get the same tree.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c requirements.lock

# Of llama.cpp only what llama-cpp-python loads is compiled; CMAKE_ARGS=-DGGML_CUDA=ON adds CUDA.
define install_llama_cpp
@echo "[1/2] llama.cpp: compiled once, in about 5 minutes of processor time; pip keeps the wheel"
@CMAKE_ARGS="$(CMAKE_ARGS) -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama_cpp_INCLUDE=$(CURDIR)/scripts/llama_cpp.cmake" \
  $(PIP) llama-cpp-python
endef

$(VENV)/serve.stamp: pyproject.toml requirements.lock | $(BIN)/python
	$(install_llama_cpp)
	@echo "[2/2] edge-phi3 and the packages that it needs"
	@$(PIP) -e .
	@touch $@

$(VENV)/dev.stamp: pyproject.toml requirements.lock | $(BIN)/python
	$(install_llama_cpp)
	@echo "[2/2] edge-phi3, the packages that it needs, and those of a developer"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/serve.stamp
