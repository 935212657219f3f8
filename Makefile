# Two environments: .venv (the platform) and .venv-serving (what runs inside the model server).
PYTHON ?= python3
VENV := .venv
SERVING := .venv-serving
BIN := $(VENV)/bin
PIP_FLAGS := --quiet --quiet --disable-pip-version-check --no-compile

# Tests start hundreds of programs: without compiled files each would compile its libraries again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-faults check lint up down bench clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(VENV)/.ready $(SERVING)/.ready ## create both environments (does nothing when they are current)

$(VENV)/.ready: pyproject.toml constraints.txt .ci/setup.sh
	@PIP_FLAGS="$(PIP_FLAGS)" PYTHON="$(PYTHON)" sh .ci/setup.sh platform $(VENV)

$(SERVING)/.ready: pyproject.toml serving/constraints.txt .ci/setup.sh
	@PIP_FLAGS="$(PIP_FLAGS)" PYTHON="$(PYTHON)" sh .ci/setup.sh serving $(SERVING)

demo: setup ## the whole main job: log -> models -> bundle -> model server -> gRPC answer
	@$(BIN)/gr demo

lint: setup
	@$(BIN)/ruff check --no-cache . && $(BIN)/ruff format --no-cache --check . && $(BIN)/mypy

check: lint ## lint, format, types, Dagster definitions
	@export DAGSTER_HOME="$(CURDIR)/dagster_home"; \
	$(BIN)/python -c "import os, pathlib; from gr_platform.commands import pipeline; \
	pipeline.make_instance(pathlib.Path(os.environ['DAGSTER_HOME']))" && $(BIN)/dg check defs

test: check ## lint, format, types and all tests but the slow faults
	@$(BIN)/python -m pytest -m "not faults"

test-faults: setup ## break processes, disks and shared memory under a real model server (minutes; best as root)
	@$(BIN)/python -m pytest -m faults

up: setup ## start Dagster, MLflow and the model server; prints their addresses
	@$(BIN)/gr up

down: ## stop exactly what `make up` started
	@if [ -x $(BIN)/gr ]; then $(BIN)/gr down; else echo "nothing is installed here, so nothing runs"; fi

bench: setup ## measure kernels, a training step and serving (after make demo; nothing else running)
	@$(BIN)/gr bench

clean: down ## remove environments and caches; state under GR_HOME stays
	@rm -rf $(VENV) $(SERVING) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
