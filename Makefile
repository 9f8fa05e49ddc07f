# `make train` and `make test` set everything up by themselves; only Python >= 3.10 and pip are needed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
CONFIG ?= configs/quickstart.yaml
PYTEST := $(BIN)/python -m pytest

.PHONY: setup train test test-all test-gpu million soak bench lint format clean

setup: $(STAMP)

# torch goes first and pinned: a bare requirement would pull a build for other hardware.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

train: setup
	$(BIN)/lasp train $(CONFIG)

million: setup
	$(BIN)/lasp train configs/million.yaml

test: setup
	$(PYTEST) -m "not slow and not gpu" --durations=15

test-all: setup
	$(PYTEST) -m "not gpu" --durations=30

test-gpu: setup
	$(PYTEST) -m gpu -rs

# twenty kills of ranks and of simulated nodes; minutes
soak: setup
	$(BIN)/python -m lasp.launch.soak configs/soak.yaml run_dir=runs/soak_torchrun --launcher torchrun --nodes 2 --kills 20
	$(BIN)/python -m lasp.launch.soak configs/soak.yaml run_dir=runs/soak_ray --launcher ray --nodes 2 --kills 20

bench: setup
	$(BIN)/python benchmarks/chunked.py --json benchmarks/results/chunked_cpu.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist runs .pytest_cache .ruff_cache
