"""Which ops must have a kernel: what the build's lists say, whatever has become of the library."""

import re
from functools import cache
from typing import Any

import evakernels.triton
from benchmarks.origin import ROOT
from evakernels import _native, backends

_FAMILIES = re.compile(r"set\(CUDA_OPS ([^)]+)\)")
_IMPLEMENTED = re.compile(r"EVAKERNELS_OP\(\s*m, (\w+)")


@cache
def cuda_ops() -> tuple[str, ...]:
    """Those that the bindings of CMake's CUDA_OPS implement."""
    found = _FAMILIES.search((ROOT / "CMakeLists.txt").read_text())
    assert found is not None
    bindings = [ROOT / f"csrc/bind/{family}.cpp" for family in found[1].split()]
    return tuple(op for path in bindings for op in _IMPLEMENTED.findall(path.read_text()))


def triton_ops() -> tuple[str, ...]:
    """Those that a Triton kernel serves."""
    return tuple(op for ops in evakernels.triton.FAMILIES.values() for op in ops)


def missing(op: str, backend: str, *args: Any) -> list[str]:
    """Why there is no kernel for the op, or for this call of it; empty if there is one."""
    if backend == "cpu" and _native.LOADED and not _native.runs_gpu_kernels("cpu"):
        return ["the library's kernels are those of the CPU, none that are interpreted"]
    return backends.why_not(op, backend, *args)
