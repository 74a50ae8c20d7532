# make demo   pre-train a graph on real text, transfer it, print the table, draw the pictures
# make test   the tests
# make bench  every op against its peers (ARGS="--grid pretraining --save": see bench/__main__.py)
# All run `make setup` first, which needs python3 (3.10 or newer), make and a network to a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: setup demo test lint bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[test,lint]"
	touch $@

demo: setup
	$(BIN)/glomo demo

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy sees the folders as they are installed: kernels/ as glomo/kernels
	rm -rf .build/typed && mkdir -p .build/typed/glomo
	for p in $(CURDIR)/glomo/*; do ln -s $$p .build/typed/glomo/; done && ln -s $(CURDIR)/kernels .build/typed/glomo/kernels
	cd .build/typed && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml -p glomo

bench: setup
	$(BIN)/python -m bench $(ARGS)

clean:
	rm -rf $(VENV) .build build *.egg-info
