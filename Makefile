PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install train test test-all lint validate clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

train: install
	$(BIN)/llmspec train examples/quickstart.llmspec

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p llmspec

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not long"

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

validate: install
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.validate

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
