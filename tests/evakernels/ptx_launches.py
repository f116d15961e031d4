"""Lets what nvcc or Triton made of the kernels serve CPU tensors, run by ptx_interpreter: `with` statements for run_ops.

Either writes to `lines`, if it is given, how many instructions each line of a source file took: JSON, [file, line,
instructions] of each.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import evakernels
import evakernels.triton
from evakernels import tuning
from ptx_interpreter.launches import Launches


@contextmanager
def nvcc_kernels(capability: int, lines: str | None = None) -> Iterator[None]:
    """Those in the library beside the package `evakernels`, which the stand-in for the CUDA runtime is linked into."""
    with Launches(Path(evakernels.__file__).with_name("_ops.so"), capability, count=False) as launches:
        try:
            yield
        finally:
            write(launches.lines, lines)
    assert launches.launches > 0


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
            write(driver.lines, lines)
    assert driver.launches > 0


def write(lines: Counter[tuple[str, int]], path: str | None) -> None:
    if path:
        Path(path).write_text(json.dumps([[*place, count] for place, count in sorted(lines.items())]))
