# `make train` and `make test` set everything up by themselves; only Python >= 3.10 and pip are needed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -q -c constraints.txt
RUN    := $(VENV)/.installed
TESTS  := $(VENV)/.installed-for-tests
TYPED  := build/site/.installed
CONFIG ?= configs/quickstart.yaml
PYTEST := $(BIN)/python -m tests.run

.PHONY: setup setup-tests train test test-all test-gpu million soak bench lint format clean

setup: $(RUN)

setup-tests: $(TESTS)

# torch goes first and pinned: a bare requirement would pull a build for other hardware.
$(RUN): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[cli]'
	touch $@

$(TESTS): $(RUN)
	$(PIP) -e '.[test]'
	touch $@

# Static checkers do not follow the mapping of an editable install.
$(TYPED): $(TESTS) $(shell find kernels lasp parallel launch -name '*.py')
	rm -rf build
	$(PIP) --no-deps --target build/site .
	touch $@

train: setup
	$(BIN)/lasp train $(CONFIG)

million: setup
	$(BIN)/lasp train configs/million.yaml

test: setup-tests
	$(PYTEST) -m "not slow and not gpu" --durations=15

test-all: setup-tests
	$(PYTEST) -m "not gpu" --durations=30

test-gpu: setup-tests
	$(BIN)/python -m pytest -m gpu -rs

# twenty kills of ranks and of simulated nodes; minutes
soak: setup-tests
	$(BIN)/python -m lasp.launch.soak configs/soak.yaml run_dir=runs/soak_torchrun --launcher torchrun --nodes 2 --kills 20
	$(BIN)/python -m lasp.launch.soak configs/soak.yaml run_dir=runs/soak_ray --launcher ray --nodes 2 --kills 20

bench: setup
	$(BIN)/python benchmarks/chunked.py --json benchmarks/results/chunked_cpu.json

lint: setup-tests $(TYPED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/site $(BIN)/mypy --strict --follow-imports=silent tests/typing

format: setup-tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist runs .pytest_cache .ruff_cache .mypy_cache
