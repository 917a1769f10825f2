# The five things one does with a clone. Everything lives in .venv; `make setup` is the only step that downloads.
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup check test
setup: $(VENV)/.ready
check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
test: setup
	$(BIN)/pytest

$(VENV)/.ready: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@
