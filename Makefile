.PHONY: demo test test-all check bench models

PYTHON ?= python3
BIN := .venv/bin
RUN := .venv/.installed-run
STAMP := .venv/.installed-dev

demo: $(RUN)
	$(BIN)/lycoris demo --force

# One worker for each core, and so one thread for each worker.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-all: $(STAMP)
	$(PYTEST)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# ARGS picks less, such as `make bench ARGS=--quick`; docs/benchmarks.md.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.layers $(ARGS)

# Outlines of the known models and docs/models.md, from the classes of diffusers and transformers.
models: $(STAMP)
	$(BIN)/python -m tools.models

# torch goes first and from constraints.txt: any other requirement would bring gigabytes of CUDA onto a CPU machine.
$(RUN): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all]"
	touch $@

# The libraries for quantised bases slow every start of diffusers, so the demo does without them.
$(STAMP): $(RUN)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
