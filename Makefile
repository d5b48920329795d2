# Two commands do all the set-up: `make demo` and `make test`. `make help` lists all targets.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=

.PHONY: help demo test test-slow lint docs mutants fuzz bench clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/.demo  ## train on the embedded digits and certify the held-out ones; ARGS=--json for JSON
	@$(BIN)/bagcert demo $(ARGS)

test: $(VENV)/.dev  ## all tests but the slow ones, in five minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-slow: $(VENV)/.dev  ## the slow tests: commands from end to end, many processes, exports, exhaustive proofs
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(ARGS)

lint: $(VENV)/.dev  ## style and types
	$(BIN)/ruff check src tests tools benchmarks docs examples
	$(BIN)/ruff format --check src tests tools benchmarks docs examples
	$(BIN)/mypy

docs: $(VENV)/.dev  ## the documentation, into build/docs
	$(BIN)/python -m sphinx -W -b html docs build/docs

mutants: $(VENV)/.dev  ## plant every known mistake in a copy of the sources; the tests must notice each (an hour)
	$(BIN)/python -m tests.mutants.run $(ARGS)

fuzz: $(VENV)/.dev  ## feed damaged files to every loader, a minute each
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[fuzz]"
	$(BIN)/python -m tests.fuzz.run --crashes build/fuzz-crashes $(ARGS)

bench: $(VENV)/.dev  ## train and compare all defenses on the embedded digits, into build/bench
	$(BIN)/bagcert benchmark --quick --out build/bench $(ARGS)

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
