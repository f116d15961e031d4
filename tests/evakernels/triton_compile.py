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

import evakernels
import evakernels.triton
from evakernels import tuning
from evakernels.tuning.calls import Draw, calls
from evakernels.tuning.search import record_kernels

DUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
THOROUGH = 90
"""The GPU for which float32 is compiled too, and the calls that lack something; what they take is less, or the same."""
HEAD_DIMS = (80, 88, 112, 128)
"""Of models, beside the 64 and 96 of the entries: for the thorough one each is compiled with the nearest entry."""

PRECISIONS = ("highest", "high")
"""`torch.set_float32_matmul_precision`: sums of float32 products (split TF32 products in the losses), and TF32."""


@dataclass(frozen=True)
class Usage:
    """Of one kernel: registers a thread, bytes of stack a thread (spilled registers), shared memory of a block."""

    capability: int
    op: str
    shape: dict[str, int]
    dtype: str
    precision: str
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
        return record_kernels(evakernels.triton.launcher(op), arguments, compile_only=True)
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
    tuning.find_gpu = lambda tensor: ("", capability)
    measured = {}
    for op, entries in tuning.table("", capability).items():
        for shape, dtype, arguments in calls_of(op, entries, thorough=capability == THOROUGH):
            for precision in PRECISIONS if dtype == torch.float32 else PRECISIONS[:1]:
                torch.set_float32_matmul_precision(precision)
                for kernel in compiled(op, arguments):
                    if kernel.hash not in measured:
                        measured[kernel.hash] = registers_and_stack(kernel.asm["cubin"])
                    name, shared = kernel.metadata.name, kernel.metadata.shared
                    yield Usage(capability, op, shape, str(dtype), precision, name, *measured[kernel.hash], shared)


def calls_of(op: str, entries: list[Any], *, thorough: bool) -> Iterator[tuple[dict[str, int], torch.dtype, Any]]:
    """Shape, dtype and arguments: of each entry the first call, which has all that may be present."""
    if thorough and "head_dim" in entries[0]["shape"]:
        entries = entries + [{"shape": entries[0]["shape"] | {"head_dim": head_dim}} for head_dim in HEAD_DIMS]
    for number, entry in enumerate(entries):
        for dtype in (torch.bfloat16, torch.float32) if thorough else (torch.bfloat16,):
            # An entry for one size of elements is compiled for that one, whichever GPU it is for.
            itemsize = entry["shape"].get("itemsize", dtype.itemsize)
            if thorough and itemsize != dtype.itemsize:
                continue
            dtype = dtype if itemsize == dtype.itemsize else torch.float32
            several = thorough and number == 0 and dtype == torch.bfloat16
            for arguments in islice(calls(op, entry["shape"], Draw("meta", dtype)), None if several else 1):
                yield entry["shape"], dtype, arguments


if __name__ == "__main__":
    found = [asdict(usage) for capability in sys.argv[1:] for usage in usages(int(capability))]
    print(json.dumps(found))
