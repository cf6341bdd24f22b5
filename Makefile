# For a fresh machine with Python 3.11 or later: `make demo` and `make test`; `make evaluate-model` needs npm too.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test check install evaluate-model

# Each stamp is one set of packages, installed at the pinned versions of constraints.txt.
$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) install --constraint constraints.txt --editable '.[test,dev]'
	@touch $@

$(VENV)/.training: $(VENV)/.test
	$(PIP) install --constraint constraints.txt --editable '.[training]'
	@touch $@

install: $(VENV)/.run  ## the package alone

demo: $(VENV)/.run  ## a doodle becomes a picture
	@mkdir -p output
	$(BIN)/sdedit run examples/apple.png "red apple, 3d" -o output/apple.png --seed 0
	@echo "The doodle: examples/apple.png. The picture: output/apple.png"

test: $(VENV)/.test  ## all tests
	$(BIN)/python -m pytest -n 2

check: $(VENV)/.test  ## style, types, and which room imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

evaluate-model: $(VENV)/.training  ## measure the default model: its figures.json, doodles.png and card
	$(BIN)/python training/evaluate.py
