"""A rehearsal: where there is no GPU, ptx_interpreter runs what nvcc and Triton made of the kernels, on CPU tensors."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import evakernels.triton
from evakernels import _native
from ptx_interpreter.runtime import Launches

_CAPABILITY = 90


@contextmanager
def interpreted() -> Iterator[None]:
    """Within the block Triton's kernels serve the CPU, and so do nvcc's in the library of `tests/cuda/ptx.cmake`."""
    from ptx_interpreter.triton_driver import Driver

    evakernels.triton.interpret()
    with ExitStack() as stack:
        stack.enter_context(Driver(_CAPABILITY, count=False))
        if _native.runs_gpu_kernels("cpu"):
            library = Path(evakernels.__file__).with_name("_ops.so")
            stack.enter_context(Launches(library, _CAPABILITY, count=False))
        yield
