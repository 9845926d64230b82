# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint table pictures clean

demo: $(VENV)/.ready
	$(BIN)/python tools/demo.py --out demo

test: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The held-out pictures (needs npm), and the table of docs/results.md (half an hour on two cores).
data/emoji: $(VENV)/.ready-dev
	$(BIN)/python tools/make_pictures.py --out data/emoji

table: data/emoji
	$(BIN)/python tools/evaluate.py --suite emoji --data data/emoji --out results

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info
