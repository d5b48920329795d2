# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=

.PHONY: demo test lint docs clean

demo: $(VENV)/.demo  ## train on the embedded digits and certify the held-out ones; ARGS=--json for JSON
	@$(BIN)/bagcert demo $(ARGS)

test: $(VENV)/.dev  ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/.dev  ## style and types
	$(BIN)/ruff check src tests tools benchmarks docs examples
	$(BIN)/ruff format --check src tests tools benchmarks docs examples
	$(BIN)/mypy

docs: $(VENV)/.dev  ## the documentation, into build/docs
	$(BIN)/python -m sphinx -W -b html docs build/docs

$(VENV)/bin/python:
	@$(PYTHON) -m venv $(VENV) >&2

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . >&2
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" >&2
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
