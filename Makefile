PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-slow test-lowest bench-coverage bench-gpu kills fuzz soak lint imports size format docs

setup: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,docs,plot]"
	touch $@

# The main job on the embedded digits: train, prune, repair, fine-tune, save, reload.
demo: setup
	rm -rf out/demo
	$(BIN)/scap-hub demo --out out/demo

# A process for each core, whole files each, because many share what a fixture made. Bytecode is kept, because dozens of
# tests start fresh processes.
test: export PYTHONDONTWRITEBYTECODE =
test: lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# Long ones too: the wheel in a fresh environment, the notebook, wide sweeps.
test-slow: setup
	$(BIN)/python -m pytest -m slow

# The declared minimums together, in an environment of their own, anew each time. Mind the Python: PYTHON=python3.10, as
# there are no wheels of releases as old for the newest.
test-lowest:
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --editable ".[dev,plot]"
	.venv-lowest/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# Every model of benchmarks/models.txt and models-tasks.txt; what the JSON holds is not measured again. With Torch-Pruning, if installed:
# make bench-coverage OPTIONS="--peer torch-pruning"
bench-coverage: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/coverage.py --reload --train --json benchmarks/results/coverage.json $(OPTIONS)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/coverage.py --models benchmarks/models-tasks.txt --reload --train \
	  --json benchmarks/results/tasks.json
	$(BIN)/python docs/generate.py

# What only a GPU can tell, in less than eight minutes: parity with the CPU, scoring, repair, latency.
bench-gpu: setup
	$(BIN)/python benchmarks/gpu.py --json benchmarks/results/gpu.json

# Broken plans, recipes, configs, folders and cards end in an error of ours or a correct result.
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python tools/fuzz.py --cases 10000

# Memory and open files stay flat over many models in one process.
soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python tools/soak.py --cycles 200

# Runs killed at random moments of every stage and resumed end with the weights of an undisturbed one.
kills: setup
	$(BIN)/python tools/kills.py --kills 20 --ranks 1 2

# The site, in site/; broken links are errors.
docs: setup
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --quiet

lint: setup
	$(BIN)/python tools/imports.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Imports inside the package run downwards, without a cycle.
imports: setup
	$(BIN)/python tools/imports.py

size: setup
	$(BIN)/python tools/size.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
