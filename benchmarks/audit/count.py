"""Runs ops on the emulated kernels and counts; a process of its own, whose `evakernels` has that library.

    python -m benchmarks.audit.count LIBRARY '[["layer_norm", "eva02-b16@224 b1", "bfloat16", "forward"]]'

prints the counts as JSON. `build.count_all` starts it.
"""

import ctypes
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import evakernels
from benchmarks import accuracy
from benchmarks.audit.budget import budget
from benchmarks.audit.cases import operation
from benchmarks.audit.result import REST, Count, Launch, Traffic
from benchmarks.operation import Draw, Operation
from benchmarks.shapes import Shape, parse_shape
from benchmarks.suite import DTYPES

Buffers = Mapping[str, Sequence[Tensor]]


class Counter:
    """The counting library, which is loaded already as that of the ops; a context counts what runs in it."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.audit_launches.restype = ctypes.c_int64
        self._names = _names_of_functions(library)

    def __enter__(self) -> None:
        self._library.audit_begin()

    def __exit__(self, *_: object) -> None:
        self._library.audit_end()

    def launches(self, buffers: Buffers) -> tuple[Launch, ...]:
        """What was counted in the last context, by buffer."""
        return tuple(self._launch(number, buffers) for number in range(self._library.audit_launches()))

    def memory(self) -> int:
        """Bytes that went between memory and the cache in the last context."""
        out = (ctypes.c_int64 * 2)()
        self._library.audit_cache(out)
        return sum(out)

    def _launch(self, number: int, buffers: Buffers) -> Launch:
        out = (ctypes.c_int64 * 13)()
        self._library.audit_launch(ctypes.c_int64(number), out)
        place, gx, gy, gz, bx, by, bz, dynamic, barriers, requests, phases, ways, worst = out
        loads, stores = self._traffic(number, buffers)
        return Launch(
            kernel=self._names[place],
            grid=(gx, gy, gz),
            block=(bx, by, bz),
            dynamic_bytes=dynamic,
            barriers=barriers / (gx * gy * gz),
            shared_ways=ways / phases if requests else None,
            worst_ways=worst,
            loads=loads,
            stores=stores,
        )

    def _traffic(self, number: int, buffers: Buffers) -> tuple[dict[str, Traffic], dict[str, Traffic]]:
        loads: dict[str, Traffic] = {}
        stores: dict[str, Traffic] = {}
        rest = self._asked(number, 0, 2**64 - 1)
        for name, tensors in buffers.items():
            parts = [self._asked(number, t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.nbytes]
            total = [sum(column) for column in zip(*parts, strict=True)]
            rest = [all_of_it - own for all_of_it, own in zip(rest, total, strict=True)]
            loads[name], stores[name] = Traffic(*total[:4]), Traffic(*total[4:])
        loads[REST], stores[REST] = Traffic(*rest[:4]), Traffic(*rest[4:])
        return _used(loads), _used(stores)

    def _asked(self, number: int, begin: int, end: int) -> list[int]:
        out = (ctypes.c_int64 * 8)()
        self._library.audit_memory(ctypes.c_int64(number), ctypes.c_uint64(begin), ctypes.c_uint64(end), out)
        return list(out)


def _used(traffic: dict[str, Traffic]) -> dict[str, Traffic]:
    return {name: own for name, own in traffic.items() if own.requests or own.sectors}


def _names_of_functions(library: Path) -> dict[int, str]:
    """By the place in the library, as the budget spells them."""
    table = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout
    # Kernels of headers are in several files, under the same symbol.
    entries = [line.split() for line in table.splitlines() if "_kernel" in line]
    names = budget().readable([symbol for _, _, symbol in entries])
    return {int(place, 16): name for (place, _, _), name in zip(entries, names, strict=True)}


def count(counter: Counter, op: Operation, shape: Shape, dtype: torch.dtype, direction: str) -> Count:
    """One call of an op of this library."""
    inputs = op.inputs(shape, Draw(dtype, torch.device("cpu"), torch.Generator().manual_seed(0)))
    buffers = {name: accuracy.tensors(value) for name, value in inputs.items() if value is not None}
    work = op.work(shape, dtype.itemsize)
    if direction == "forward":
        cost = work.forward
        with torch.no_grad(), counter:
            outputs = accuracy.tensors(op.ours(**inputs))
        buffers |= {f"out {i}": [output] for i, output in enumerate(outputs)}
    else:
        assert work.backward is not None
        cost = work.backward
        leaves = [leaf.requires_grad_() for leaf in accuracy.gradient_leaves(op, inputs)]
        outputs = accuracy.tensors(op.ours(**inputs))
        upstream = [torch.randn_like(output) for output in outputs]
        with counter:
            gradients = torch.autograd.grad(outputs, leaves, upstream)
        buffers |= {f"d out {i}": [gradient] for i, gradient in enumerate(upstream)}
        buffers |= {f"d {name}": [gradient] for name, gradient in zip(op.gradients, gradients, strict=True)}
    buffers = _apart(buffers)
    sizes = {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in buffers.items()}
    name = str(dtype).removeprefix("torch.")
    return Count(op.name, shape.name, name, direction, cost.bytes, counter.memory(), sizes, counter.launches(buffers))


def _apart(buffers: Buffers) -> dict[str, list[Tensor]]:
    """Without the tensors that are an earlier one again, as gradients of summands are and parameters after a step."""
    seen: set[int] = set()
    result = {}
    for name, tensors in buffers.items():
        new = [tensor for tensor in tensors if tensor.data_ptr() not in seen]
        seen |= {tensor.data_ptr() for tensor in new}
        if new:
            result[name] = new
    return result


def main() -> None:
    """Counts what the command line asks for."""
    library, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
    counter = Counter(library)
    counts = []
    with evakernels.use_backend("cpu"):
        for op, shape, dtype, direction in asked:
            counts.append(asdict(count(counter, operation(op), parse_shape(shape), DTYPES[dtype], direction)))
    json.dump(counts, sys.stdout)


if __name__ == "__main__":
    main()
