PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint format

setup: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,plot]"
	touch $@

# The main job on the embedded digits: train, prune, repair, fine-tune, save, reload.
demo: setup
	rm -rf out/demo
	$(BIN)/scap-hub demo --out out/demo

test: lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
