# The two commands of the README: `make demo` and `make test`. Both make .venv when it is missing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Threads beyond one per test worker only fight each other.
JOBS   ?= 2

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/diptych tour -o report/

test: $(VENV)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

# torch goes in first and alone: a plain requirement could pull a newer build with gigabytes of CUDA libraries.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  f"expected Python >= 3.11, got {v.major}.{v.minor}; fix: make PYTHON=python3.11")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep '^torch==' constraints.txt)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) report build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find diptych tests -name __pycache__ -type d -prune -exec rm -rf {} +
