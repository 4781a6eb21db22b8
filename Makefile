# make demo: every notebook and figure. make test: what CI runs.
# Each makes its own environment in .venv; only Python 3.11 or later with pip is needed.
PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV := .venv
BIN := $(VENV)/bin
# pinned, and installed first: a range would pull the CUDA build on machines without a GPU
TORCH ?= torch==2.13.0
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo test clean

$(VENV)/.installed: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --constraint .ci/constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	for notebook in $(NOTEBOOKS); do $(BIN)/scanlm run $$notebook || exit 1; done
	$(BIN)/scanlm figures

# two processes of one thread each: more threads wait for each other
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --quiet -n 2 --durations 10 tests
	$(BIN)/pytest --quiet -n 2 --dist loadfile --nbval-lax --nbval-current-env notebooks

clean:
	rm -rf $(VENV)
