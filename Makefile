# Two commands do all: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test mutants docs lint clean

demo: .venv
	$(BIN)/scoresde demo --overwrite true

# one thread for each of the two processes: more would only wait for each other
test: .venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# plausible mistakes, one at a time in a copy: the tests named with each have to notice it
mutants: .venv
	$(BIN)/python tests/mutants.py

# the site, into build/docs; its measured tables are made first, and a warning is an error
docs: .venv
	$(BIN)/python docs/results_tables.py
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet \
		--doctree-dir build/doctrees docs build/docs
	@echo build/docs/index.html

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# made again whenever what is to be installed changes
.venv: .venv/installed
.venv/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,docs]"
	touch .venv/installed

clean:
	rm -rf .venv build dist *.egg-info docs/notebooks
