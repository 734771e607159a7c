# `make demo`, `make test` and `make test-slow` need nothing but Python 3.11 or newer: each makes .venv when it is absent.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow check format
.DELETE_ON_ERROR:

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tlkit needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[offline,heic,dev]'
	touch $@

demo: .venv/installed
	$(BIN)/tlkit demo

test: .venv/installed check
	$(BIN)/pytest -n auto -m 'not slow'

test-slow: .venv/installed
	$(BIN)/pytest -n auto -m slow

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
