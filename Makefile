# Two commands for newcomers: `make quickstart` and `make test`. Both make .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Address of the index with the CPU build of torch (pytorch.org, "Get started", names it):
#   make test TORCH_INDEX=...
# Empty: pip's own default, which on Linux may bring several GB of CUDA packages.
TORCH_INDEX ?=
TORCH_FLAGS := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test test-slow test-gpu test-ray lint format clean

quickstart: $(VENV)/.installed-obp
	$(BIN)/offtower quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m gpu

test-ray: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m ray

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info python/*.egg-info python/offtower/ops/*.so

# torch comes first and alone, so that a package which asks for "torch" finds it installed.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_FLAGS) torch
	touch $@

$(VENV)/.installed-%: $(VENV)/.torch pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h')
	$(PIP) --editable ".[$*]"
	touch $@
