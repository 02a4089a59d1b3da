# On a fresh machine with Python 3.11 to 3.13 and make: `make demo` shows what Partita does, `make test` checks that it works.
# Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-torch quick lint format docs chromium golden drawings benchmark clean

demo: .venv/installed
	$(BIN)/partita run --devices 4 examples/train_digits.py --epochs 3

test: lint .venv/compilers
	$(BIN)/python -m pytest -n 2

# PyTorch modules: installs the extra (3 GB); the other tests run without it.
test-torch: .venv/torch
	$(BIN)/python -m pytest tests/pytorch

# The part of the tests that needs no training and no processes: under two minutes.
quick: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 tests/cost tests/graph tests/machine tests/plans tests/search tests/simulation tests/test_imports.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site in build/site, every link and reference checked.
docs: .venv/docs
	$(BIN)/mkdocs build --strict

# Browser tests look at reports in Chromium and are skipped without one. This installs Debian's.
chromium:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { apt-get update -q && apt-get install -qy chromium; }

# Rewrites the files that tests compare with: saved graphs, stored output of the examples. Read the difference before you commit it.
golden: .venv/installed
	$(BIN)/python tests/data/make_graphs.py
	$(BIN)/python tests/test_examples.py

drawings: .venv/installed
	$(BIN)/python docs/drawings.py

benchmark: .venv/installed
	$(BIN)/python benchmarks/compiler.py
	$(BIN)/partita bench fidelity
	$(BIN)/python benchmarks/equality.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or \
	  sys.exit(f"Partita needs Python 3.11 to 3.13, and $(PYTHON) is {v.major}.{v.minor}. Name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

.venv/torch: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[torch]"
	@touch $@

# XLA:TPU of the version that JAX names, beside the environment: inside it, it would print into every process.
# Where there is no wheel of it, its test is skipped.
.venv/compilers: .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps --target $@ \
	  "$$($(BIN)/python -c 'from importlib.metadata import requires; print(next(r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")))')" \
	  || mkdir -p $@

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	@touch $@
