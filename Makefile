# On a fresh machine with Python 3.11 to 3.13 and make: `make demo` shows what Partita does, `make test` that it works.
# Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test chromium lint format golden benchmark clean

demo: .venv/installed
	$(BIN)/partita run --devices 4 examples/train_digits.py --epochs 3

test: lint chromium
	$(BIN)/python -m pytest -n 2

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The tests look at reports in a browser. Where there is none, Debian's is installed; elsewhere, install Chromium or Chrome.
chromium:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { apt-get update -q && apt-get install -qy chromium; }

# Rewrites what tests compare with: saved graphs, stored output of the examples. Look at the difference before you commit it.
golden: .venv/installed
	$(BIN)/python tests/data/make_graphs.py
	$(BIN)/python tests/test_examples.py

benchmark: .venv/installed
	$(BIN)/python benchmarks/compiler.py
	$(BIN)/partita bench fidelity
	$(BIN)/python benchmarks/equality.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or \
	  sys.exit(f"Partita needs Python 3.11 to 3.13, and $(PYTHON) is {v.major}.{v.minor}: name another, make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@
