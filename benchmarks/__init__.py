"""Time, memory and error of every op, against its peers, this machine's roofline, and float64.

`python -m benchmarks list` shows the operations; docs/benchmarks.md shows how a file of yours adds a candidate.
"""

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = "--installed"


def choose_evakernels() -> None:
    """Let Python import the installed evakernels and evaclip instead of this checkout's.

    `python -m benchmarks` imports the checkout's. That stays if the checkout is compiled, unless `INSTALLED` is among
    the arguments, and if no other evakernels is installed.
    """
    compiled = (ROOT / "evakernels" / "_ops.so").exists()
    if "evakernels" in sys.modules or (compiled and INSTALLED not in sys.argv):
        return
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    if PathFinder.find_spec("evakernels", elsewhere) is not None:
        sys.path[:] = elsewhere


choose_evakernels()  # before anything imports either

if TYPE_CHECKING:
    from benchmarks.operation import Cost, Draw, Operation, Work, peer, register
    from benchmarks.shapes import Shape

__all__ = ["Cost", "Draw", "Operation", "Shape", "Work", "peer", "register"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: `benchmarks.gpu_check` must not load torch.
    if name not in __all__:
        raise AttributeError(f"module 'benchmarks' has no attribute {name!r}")
    return getattr(import_module("benchmarks.shapes" if name == "Shape" else "benchmarks.operation"), name)
