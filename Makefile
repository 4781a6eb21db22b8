PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test clean

# torch first and pinned: a range would pull the CUDA build
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --quiet tests

clean:
	rm -rf $(VENV)
