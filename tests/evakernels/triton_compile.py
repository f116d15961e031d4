"""Compiles the Triton kernels for GPUs that aren't here, and reads out what they take of a multiprocessor.

    python tests/evakernels/triton_compile.py 80 90     JSON: one object for each kernel of each shipped configuration

The launchers are called as on a GPU, with tensors that have sizes and no data. Where they would launch, Triton compiles
for the types and alignments of the arguments, and goes on. A launcher that waits for the GPU fails here.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import evakernels.triton
from evakernels import tuning
from evakernels.tuning.calls import Draw, calls
from evakernels.tuning.search import kernels_of

DUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
EVERY_DTYPE = 90
"""The GPU for which all dtypes and all calls are compiled; for the others only bfloat16, and the first call."""


@dataclass(frozen=True)
class Usage:
    """Of one kernel: registers a thread, bytes of stack a thread (spilled registers), shared memory of a block."""

    capability: int
    op: str
    shape: dict[str, int]
    dtype: str
    kernel: str
    registers: int
    stack: int
    shared: int


class AbsentGPU:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compiled(op: str, arguments: tuple[Any, ...]) -> list[Any]:
    """The kernels that a call of the op would launch."""
    try:
        return kernels_of(evakernels.triton.launcher(op), arguments, compile_only=True)
    except Exception as error:
        sizes = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in arguments]
        error.add_note(f"{op} of {sizes} on {driver.active.get_current_target()}")
        raise


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([DUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = dict(part.split(":")[:2] for part in report.split("Function")[1].split() if part.count(":") == 1)
    return int(numbers["REG"]), int(numbers["STACK"])


def usages(capability: int) -> Iterator[Usage]:
    """Of all kernels of all configurations that the GPUs of this compute capability are given."""
    driver.set_active(AbsentGPU(capability))
    tuning.gpu_of = lambda tensor: ("", capability)
    measured = {}
    everything = capability == EVERY_DTYPE
    dtypes = [torch.bfloat16, torch.float16, torch.float32] if everything else [torch.bfloat16]
    for op, entries in tuning.table("", capability).items():
        for entry in entries:
            for dtype in dtypes:
                if dtype.itemsize != entry["shape"].get("itemsize", dtype.itemsize):
                    continue
                arguments_of_calls = calls(op, entry["shape"], Draw("meta", dtype))
                for arguments in arguments_of_calls if everything else islice(arguments_of_calls, 1):
                    for kernel in compiled(op, arguments):
                        where = capability, op, entry["shape"], str(dtype).removeprefix("torch.")
                        if kernel.hash not in measured:
                            measured[kernel.hash] = registers_and_stack(kernel.asm["cubin"])
                        yield Usage(*where, kernel.metadata.name, *measured[kernel.hash], kernel.metadata.shared)


if __name__ == "__main__":
    found = [asdict(usage) for capability in sys.argv[1:] for usage in usages(int(capability))]
    print(json.dumps(found))
