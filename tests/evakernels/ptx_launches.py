"""`with` statements for run_ops: ptx_interpreter runs what nvcc or Triton made of the kernels, on CPU tensors."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import evakernels
import evakernels.triton
from benchmarks.audit import budget
from evakernels import _logit_gradients, tuning
from ptx_interpreter.gpus import GPUS
from ptx_interpreter.runtime import Launches

gc.disable()  # of the many objects that kernels are read into none is garbage

small_chunks = patch.object(_logit_gradients, "CHUNK", (1 << 13, 256))
"""Few rows of logits have several chunks."""


@contextmanager
def nvcc_kernels(capability: int, lines: str | None = None, gpu: str | None = None) -> Iterator[Launches]:
    """Those in the library beside the package `evakernels`, which the stand-in for the CUDA runtime is linked into.

    `lines`: a file for how many instructions each line of a source file took, JSON: [file, line, instructions] of each.
    `gpu`: the GPU whose sizes the launch plans see.
    """
    library = Path(evakernels.__file__).with_name("_ops.so")
    registers = budget().registers_of(f"sm_{GPUS[gpu].capability}") if gpu else None
    with small_chunks, Launches(library, capability, gpu=gpu, registers=registers, count=False) as launches:
        try:
            yield launches
        finally:
            assert launches.launches > 0
            if lines:
                counts = [[*place, count] for place, count in sorted(launches.lines.items())]
                Path(lines).write_text(json.dumps(counts))


@contextmanager
def triton_kernels(capability: int) -> Iterator[None]:
    """Those of Triton alone: no other backend serves an op."""
    from ptx_interpreter.triton_driver import Driver

    evakernels.triton.interpret()
    tuning.find_gpu = lambda tensor: ("", capability)
    with small_chunks, Driver(capability, count=False) as driver, evakernels.use_backend("triton"):
        try:
            yield
        finally:
            assert driver.launches > 0
