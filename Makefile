# make demo   compress a small model, run it, print the report
# make test   lint, types and all tests
# Both make their own environment in .venv; PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
JOBS ?= 2
ARGS ?=

.PHONY: demo test lint format venv clean
.DEFAULT_GOAL := test

# The installed commands, not `python -m`: that would put this folder, and so a `triton_kernels`, on sys.path.
demo: $(STAMP)
	$(BIN)/halfweight demo $(ARGS)

# One thread per worker: more would only fight over the cores. loadgroup keeps tests that share a slow set-up together.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadgroup $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/typing $(BIN)/mypy -p halfweight

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup_env.sh
	PYTHON="$(PYTHON)" bash scripts/setup_env.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
