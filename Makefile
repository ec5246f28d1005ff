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

.PHONY: quickstart installed-test test test-slow test-gpu test-gpu-sanitized test-asan test-ray lint format docs fuzz clean

quickstart: $(VENV)/.installed-obp
	$(BIN)/offtower quickstart

installed-test: $(VENV)/.installed-test

# On one process more than there are cores, up to eight. The tests of a file stay together, as they
# share what they set up; folders with long ones come first, so that no core waits at the end.
LONG_TESTS := tests/ops tests/training tests/retrieval tests/evaluation tests/cli
# Not 'tests' for the others: pytest drops folders that another argument contains, and their order.
OTHER_TESTS := $(filter-out $(LONG_TESTS) tests/__pycache__,$(patsubst %/,%,$(wildcard tests/*/))) \
  $(wildcard tests/test_*.py)
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile \
	  --no-loadscope-reorder $(LONG_TESTS) $(OTHER_TESTS)

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow --numprocesses auto --maxprocesses 8 --dist loadfile

# On a machine with an NVIDIA GPU and nvcc. PYTEST="python3 -m pytest" runs in an environment of yours.
PYTEST ?= $(BIN)/python -m pytest
test-gpu: $(if $(filter $(BIN)/python,$(firstword $(PYTEST))),$(VENV)/.installed-test)
	$(PYTEST) -m gpu tests/ops tests/training/test_device_gpu.py

# The same kernels under each tool of compute-sanitizer, on shapes that it gets through in minutes.
test-gpu-sanitized: $(if $(filter $(BIN)/python,$(firstword $(PYTEST))),$(VENV)/.installed-test)
	for tool in memcheck racecheck initcheck synccheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    --target-processes all $(PYTEST) -m gpu tests/ops/test_cuda.py -k sanitized || exit 1; \
	done

# The CPU core under AddressSanitizer and UBSan, over the operators' tests that measure neither memory
# nor threads and build no CUDA kernels.
SANITIZED := build/sanitized/package
ASAN_TESTS := bindings draws edge_values eligible_items native_accuracy native_process policy_terms search_and_sampling torch_defaults
ASAN_SKIP := memory or rounds_by_items or more_threads or million or signal_ends or 0.001 or 6.0
test-asan: $(VENV)/.installed-test
	rm -rf build/sanitized
	OFFTOWER_SANITIZE=1 OFFTOWER_CUDA=0 $(PIP) --no-deps --target $(SANITIZED) .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) $(BIN)/python -m pytest --numprocesses auto \
	  $(ASAN_TESTS:%=tests/ops/test_%.py) -k "not ($(ASAN_SKIP))"

test-ray: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "ray and not slow"

FUZZ_SECONDS ?= 600
fuzz: $(VENV)/.installed-test
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy
	$(BIN)/python tools/check_wording.py

docs: $(VENV)/.installed-docs
	$(BIN)/python tools/generate_reference.py --check
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -b html docs build/docs

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

clean:
	rm -rf build dist *.egg-info python/*.egg-info python/offtower/ops/*.so python/offtower/ops/_cuda_build.txt

# torch comes first and alone, so that a package which asks for "torch" finds it installed.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_FLAGS) torch
	touch $@

$(VENV)/.installed-%: $(VENV)/.torch pyproject.toml setup.py $(NATIVE)
	$(PIP) --editable ".[$*]"
	touch $@
