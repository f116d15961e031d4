"""Which ops must have a kernel: those of the sources, whatever has become of the library."""

import re
from functools import cache
from typing import Any

import evakernels.triton
from benchmarks.origin import ROOT
from evakernels import _native, backends

_REGISTERED = re.compile(r"^EVAKERNELS_OPS\(", re.MULTILINE)
_IMPLEMENTED = re.compile(r"EVAKERNELS_OP\(\s*m, (\w+)")


@cache
def cuda_ops() -> tuple[str, ...]:
    """The ops that the bindings in csrc/bind register for both devices."""
    bindings = [path.read_text() for path in sorted((ROOT / "csrc/bind").glob("*.cpp"))]
    return tuple(op for text in bindings if _REGISTERED.search(text) for op in _IMPLEMENTED.findall(text))


def triton_ops() -> tuple[str, ...]:
    """Those that a Triton kernel serves."""
    return tuple(op for ops in evakernels.triton.FAMILIES.values() for op in ops)


def missing(op: str, backend: str, *args: Any) -> list[str]:
    """Why there is no kernel for the op, or for this call of it; empty if there is one."""
    if backend == "cpu" and _native.LOADED and not _native.runs_gpu_kernels("cpu"):
        return ["the library's kernels are those of the CPU, none that are interpreted"]
    return backends.why_not(op, backend, *args)
