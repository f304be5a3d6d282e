.PHONY: demo test test-all check bench models docs

PYTHON ?= python3
BIN := .venv/bin
RUN := .venv/.installed-run
STAMP := .venv/.installed-dev
DOCS := .venv/.installed-docs

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

# The documentation site, in build/site. Every warning is an error, and every link is checked.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# torch goes first and from constraints.txt: any other requirement would bring gigabytes of CUDA onto a CPU machine.
$(RUN): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all]"
	touch $@

# The libraries for quantized bases slow every start of diffusers, so the demo does without them.
$(STAMP): $(RUN)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# The tests do without mkdocs, so it has a stamp of its own.
$(DOCS): $(RUN)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all,docs]"
	touch $@
