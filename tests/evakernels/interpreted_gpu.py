"""A plugin of pytest: the GPU kernels, of nvcc and of Triton, run in the interpreter on CPU tensors.

nvcc's kernels are in the library of tests/cuda/ptx.cmake, which takes the place of evakernels/_ops.so. pytest starts
again with a preloaded allocator, which tells the interpreter the bounds of tensors. Environment variables:

    PTX_CAPABILITY  the compute capability times ten, by default 90
    PTX_COMPILER    "nvcc" or "triton": its kernels alone; every op must be served by those of Triton
    PTX_GPU         name of the GPU whose sizes the launch plans see
    PTX_LINES       file for the instructions of each source line, JSON: [file, line, instructions] of each
"""

import gc
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import mkdtemp
from unittest.mock import patch

import evakernels.triton
from benchmarks.audit import budget
from evakernels import _logit_gradients, _native, tuning
from ptx_interpreter.memory import GlobalMemory, build_allocations
from ptx_interpreter.runtime import Launches

if not GlobalMemory().follow_allocations():
    os.environ["LD_PRELOAD"] = str(build_allocations(Path(mkdtemp())))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

gc.disable()  # of the many objects that kernels are read into none is garbage
_compiler, _gpu, _lines = (os.environ.get(f"PTX_{name}") for name in ("COMPILER", "GPU", "LINES"))
_capability = int(os.environ.get("PTX_CAPABILITY", "90"))
_contexts = ExitStack()
launches: Launches | None = None
driver = None
"""What served the launches of nvcc's kernels and of Triton's."""


def pytest_configure():
    global driver, launches
    _contexts.enter_context(patch.object(_logit_gradients, "CHUNK", (1 << 13, 256)))  # several chunks of few rows
    if _compiler != "nvcc":
        from ptx_interpreter.triton_driver import Driver

        evakernels.triton.interpret()
        tuning.find_gpu = lambda tensor: ("", _capability)
        driver = _contexts.enter_context(Driver(_capability, count=False))
    if _compiler == "triton":
        _contexts.enter_context(evakernels.use_backend("triton"))
    elif _native.runs_gpu_kernels("cpu"):
        registers = budget().registers_of(f"sm_{_capability}") if _gpu else None
        library = Path(evakernels.__file__).with_name("_ops.so")
        launches = Launches(library, _capability, gpu=_gpu, registers=registers, count=False)
        _contexts.enter_context(launches)


def pytest_sessionfinish(session):
    if _compiler == "nvcc" and launches.launches == 0:
        session.exitstatus = 1
    if _lines:
        counts = [[*place, count] for place, count in sorted(launches.lines.items())]
        Path(_lines).write_text(json.dumps(counts))


def pytest_unconfigure():
    _contexts.close()
