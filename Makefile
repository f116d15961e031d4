# make demo   train on real pictures, evaluate, and write runs/demo/report.html
# make test   run the whole test suite
# make gpu-check   on a machine with a GPU: every op against float64 and its peers; keeps the result
#
# Every target sets up what it needs: a virtual environment in .venv, the dependencies, the native library.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD_TOOLS := setuptools cmake ninja pybind11
CPP_FILES := $(shell find csrc tests -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")

.PHONY: demo test gpu-check build lint format clean

demo: build
	$(BIN)/evaclip demo --out runs/demo

# A process for each processor, each with one thread: torch's own would only take each other's processor.
test: build $(VENV)/oldest-triton
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist loadgroup --no-loadscope-reorder

gpu-check: build
	$(BIN)/python -m benchmarks all --device cuda --dtype float32 --dtype bfloat16 --dtype float16 --check \
		--json benchmarks/results

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

build: $(VENV)/.built

$(VENV)/.tools: Makefile
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install $(BUILD_TOOLS) torch torchvision
	touch $@

# No build isolation: the torch that was just installed serves the build, not a second download.
$(VENV)/.built: $(VENV)/.tools pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	$(BIN)/python -m pip install --no-build-isolation --editable '.[test]'
	touch $@

# The oldest Triton that the kernels must compile with, that of torch 2.11; it is on that one test's path alone.
$(VENV)/oldest-triton: | $(VENV)/.tools
	$(BIN)/python -m pip install --quiet --no-deps --target $@ 'triton==3.6.*'

clean:
	rm -rf $(VENV) build dist *.egg-info evakernels/*.so evakernels/_build.json
