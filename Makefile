# On a fresh machine with Python 3.11 to 3.13 and make: `make demo` shows what Partita does, `make test` that it works.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint format benchmark clean

demo: .venv/installed
	$(BIN)/partita run --devices 4 examples/train_digits.py --epochs 3

test: lint
	$(BIN)/python -m pytest -n 2

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: .venv/installed
	$(BIN)/python benchmarks/fidelity.py
	$(BIN)/python benchmarks/equality.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
