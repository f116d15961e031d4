"""A plugin of pytest: the GPU kernels, of nvcc and of Triton, run in the interpreter on CPU tensors.

nvcc's kernels are in the library of tests/cuda/ptx.cmake, which takes the place of evakernels/_ops.so. pytest starts
again with a preloaded allocator, which tells the interpreter the bounds of tensors.
"""

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import mkdtemp
from unittest.mock import patch

import evakernels.triton
from evakernels import _logit_gradients, _native
from ptx_interpreter.memory import GlobalMemory, build_allocations
from ptx_interpreter.runtime import Launches
from ptx_interpreter.triton_driver import Driver

if not GlobalMemory().follow_allocations():
    os.environ["LD_PRELOAD"] = str(build_allocations(Path(mkdtemp())))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

_CAPABILITY = 90
_contexts = ExitStack()


def pytest_configure():
    evakernels.triton.interpret()
    _contexts.enter_context(patch.object(_logit_gradients, "CHUNK", (1 << 13, 256)))  # several chunks of few rows
    _contexts.enter_context(Driver(_CAPABILITY, count=False))
    if _native.runs_gpu_kernels("cpu"):
        library = Path(evakernels.__file__).with_name("_ops.so")
        _contexts.enter_context(Launches(library, _CAPABILITY, count=False))


def pytest_unconfigure():
    _contexts.close()
