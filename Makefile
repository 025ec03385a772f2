# Everything runs in a virtual environment of its own, made on first use with the versions of constraints.txt.
#
#   make demo        install, fetch the demo model, pack it, run it under a budget
#   make test        install with test tools, lint, type check, quick tests, native code under AddressSanitizer
#   make check       lint, type check and the tests that mirror what changed since SINCE
#   make test-slow   the long tests: real models, memory cgroups
#   make lint        ruff and mypy alone            make format      rewrite the sources with ruff
#   make sanitize    native code under AddressSanitizer and ThreadSanitizer
#   make bench       speed of the demo pack         make gpu-report  GPU tests and benchmark, with the Python at hand
#   make peers       environments of the systems that tools.benchmarks.peers compares with
#   make benchmarks-page  docs/benchmarks.md and its plots, from the records in docs/benchmarks
#   make clean       remove what was built; models stay
#
# PYTHON names the interpreter to start from (3.10 or later), VENV the environment, MODELS where packs are kept, SINCE
# the commit, tag or branch that `make check` compares with (main).

PYTHON ?= python3
VENV ?= .venv
MODELS ?= models
DEMO_DTYPE ?= int4
DEMO_BUDGET_GB ?= 0.7
DEMO_PROMPT ?= Write a Python function that returns the n-th Fibonacci number.
PYTEST_ARGS ?=
SINCE ?= main
PEERS ?= .peers
GPU_REPORT ?= docs/benchmarks/gpu.json

comma := ,
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUNTIME := $(VENV)/.runtime
DEV := $(VENV)/.dev
DEMO_PACK := $(MODELS)/demo-$(DEMO_DTYPE)
NATIVE := kernels/flashrt_kernels/cpu flashrt/storage/native
BUILD_FILES := pyproject.toml constraints.txt CMakeLists.txt $(foreach kind,cpp h cmake,$(wildcard $(addsuffix /*.$(kind),$(NATIVE))))

# Two processes, each with about half of the time: most of it is spent waiting for one core.
HALF := $(addprefix tests/,engine kernels storage)
QUICK := $(BIN)/python -m pytest -m "not slow and not gpu" --durations=15 $(PYTEST_ARGS)

.PHONY: demo test check test-slow lint format sanitize bench gpu-report peers benchmarks-page clean

demo: $(DEMO_PACK)/manifest.json
	$(BIN)/flashrt run $(DEMO_PACK) --budget-gb $(DEMO_BUDGET_GB) --max-new-tokens 128 --prompt "$(DEMO_PROMPT)"

test: lint build/native-address
	$(QUICK) $(HALF) & first=$$!; $(QUICK) tests $(addprefix --ignore=,$(HALF)); second=$$?; wait $$first && exit $$second

check: lint
	tests=$$($(BIN)/python tools/changed_tests.py --since $(SINCE)) && \
		$(BIN)/python -m pytest -m "not slow and not gpu and not budget" $$tests $(PYTEST_ARGS)

test-slow: $(DEV)
	$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sanitize: build/native-address build/native-thread

build/native-%: $(DEV) FORCE
	$(BIN)/cmake -S tests/native -B $@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DSANITIZE=$(subst address,address$(comma)undefined,$*)
	$(BIN)/cmake --build $@ -j 2
	$(BIN)/ctest --test-dir $@ --output-on-failure

FORCE:

bench: $(DEMO_PACK)/manifest.json
	$(BIN)/flashrt bench $(DEMO_PACK) --budget-gb $(DEMO_BUDGET_GB) --json

# No environment is made and nothing is installed: the machine with the GPU may be unable to download anything.
gpu-report:
	PYTHONPATH=.:kernels $(PYTHON) -m tools.benchmarks.gpu_report --out $(GPU_REPORT)

peers: $(PEERS)/llama.cpp/.made $(PEERS)/transformers/.made $(PEERS)/airllm/.made

benchmarks-page: $(DEV)
	$(BIN)/python -m tools.benchmarks.page --plots

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "flashrt needs Python 3.10 or later; set PYTHON")'
	$(PYTHON) -m venv $(VENV)

# The build tools come from the constraints too, hence an install without build isolation.
$(RUNTIME): $(BUILD_FILES) | $(BIN)/python
	$(PIP) install -q -c constraints.txt scikit-build-core nanobind cmake ninja
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) install -q -c constraints.txt --no-build-isolation -e .
	touch $@

$(DEV): $(RUNTIME)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

# Each peer has an environment of its own. llama.cpp is compiled for this machine, as a user who wants speed would.
$(PEERS)/%/.made: tools/benchmarks/peers/%.txt constraints.txt
	$(PYTHON) -m venv $(PEERS)/$*
	CMAKE_ARGS=-DGGML_NATIVE=ON $(PEERS)/$*/bin/python -m pip --disable-pip-version-check install -q \
		-c constraints.txt -r $< --no-binary llama-cpp-python
	touch $@

# Only the manifest of a finished pack counts; an interrupted one is resumed.
$(DEMO_PACK)/manifest.json: | $(RUNTIME)
	$(BIN)/flashrt pull demo
	$(BIN)/flashrt pack demo $(DEMO_PACK) --dtype $(DEMO_DTYPE)
