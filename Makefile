# Two commands for a newcomer; both make .venv and install what they need, and can be run again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: repro test lint falsify clean

repro: $(INSTALLED)
	$(BIN)/python paper_repro.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

# torch goes first and by its exact version: left to the resolver it may bring gigabytes of CUDA libraries.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,dev]'
	touch $@

# For every bound 10,000 cases of chance, then 10,000 evaluations of the attacks: some forty minutes on 2 cores.
falsify: $(INSTALLED)
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -q -n 2 tests/test_upper_bounds.py -k test_upper_holds
	$(BIN)/python -m empirics attack all --budget 10000

clean:
	rm -rf $(VENV) build *.egg-info results
