"""`with` statements for run_ops, in which ptx_interpreter runs what nvcc or Triton made of the kernels on CPU tensors.

Either writes to `lines`, if it is given, how many instructions each line of a source file took: JSON, [file, line,
instructions] of each.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import evakernels
import evakernels.triton
from evakernels import tuning
from ptx_interpreter.runtime import Launches


@contextmanager
def nvcc_kernels(capability: int, lines: str | None = None) -> Iterator[None]:
    """Those in the library beside the package `evakernels`, which the stand-in for the CUDA runtime is linked into."""
    with Launches(Path(evakernels.__file__).with_name("_ops.so"), capability, count=False) as launches:
        try:
            yield
        finally:
            tell(launches, lines)


@contextmanager
def triton_kernels(capability: int, lines: str | None = None) -> Iterator[None]:
    """Those of Triton alone: no other backend serves an op."""
    from ptx_interpreter.triton_driver import Driver

    # As in Triton's interpreter: CPU tensors are served, in small pieces.
    evakernels.triton.INTERPRETED = True
    for op in [op for ops in evakernels.triton.FAMILIES.values() for op in ops]:
        evakernels.triton.register(op)
    tuning.gpu_of = lambda tensor: ("", capability)
    with Driver(capability, count=False) as driver, evakernels.use_backend("triton"):
        try:
            yield
        finally:
            tell(driver, lines)


def tell(served: Any, path: str | None) -> None:
    """The lines, at the end of a process that must have launched something."""
    if path:
        Path(path).write_text(json.dumps([[*place, count] for place, count in sorted(served.lines.items())]))
    assert served.launches > 0
