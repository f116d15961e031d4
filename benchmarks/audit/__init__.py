"""Instructions and memory accesses of the GPU kernels, counted in their PTX, for machines without a GPU.

`ptx_interpreter` runs nvcc's and Triton's PTX on the CPU. `cases` lists the audited calls, `build` compiles the library
with nvcc's PTX, `count` counts in another process, `result` compares with the bytes by formula of
`benchmarks.cases`, and `table` shows all that. Nothing here measures time.
"""

import importlib.util
from functools import cache
from types import ModuleType

from benchmarks import ROOT


@cache
def budget() -> ModuleType:
    """Return `tests/cuda/budget.py`, a script outside of all packages, as a module."""
    spec = importlib.util.spec_from_file_location("budget", ROOT / "tests/cuda/budget.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
