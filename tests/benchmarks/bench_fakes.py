"""An operation small enough to be measured in a test, a timer without a clock, and results without a measurement."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.operation import Cost, Draw, Function, Inputs, Operation, Work, _operations, _peers, peer, register
from benchmarks.results import Machine, Row
from benchmarks.shapes import Shape
from benchmarks.timing import Rotation

CPU = torch.device("cpu")


def tanh(x: Tensor) -> Tensor:
    """The operation."""
    return x.tanh()


def tanh_operation(**changes: Any) -> Operation:
    """tanh over a small tensor, a composition: no op of the library stands behind it."""
    options: dict[str, Any] = {
        "name": "tanh",
        "summary": "hyperbolic tangent",
        "inputs": lambda shape, draw: {"x": draw.normal(shape.batch, shape.width)},
        "eager": tanh,
        "ours": tanh,
        "work": lambda shape, itemsize: Work(Cost(0, 8 * shape.batch), Cost(16 * shape.batch, 0)),
        "shapes": {"cpu": ("tiny b2",), "cuda": ("tiny b2",)},
        "gradients": ("x",),
    }
    return Operation(**(options | changes))


@contextmanager
def registered(op: Operation, **peers: Function) -> Iterator[Operation]:
    """The operation with its peers, forgotten afterwards."""
    register(op)
    for name, function in peers.items():
        peer(op.name, name)(lambda shape, function=function: function)
    try:
        yield op
    finally:
        _operations.pop(op.name)
        _peers.pop(op.name, None)


def draw(op: Operation, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """A set of inputs on the CPU."""
    return op.inputs(shape, Draw(dtype, CPU, torch.Generator().manual_seed(seed)))


class FakeTimer:
    """Calls everything once and returns a millisecond."""

    def __init__(self) -> None:
        self.launched: dict[int, str] = {}

    def first_call(self, call: Any) -> float:
        call()
        return 0.5

    def rounds(self, rotations: Sequence[Rotation], seconds: float) -> list[list[float]]:
        return [[1.0, 1.0] for _ in rotations]


def machine(**changes: Any) -> Machine:
    """A machine that copies 10 GB/s and multiplies 0.1 TFLOP/s."""
    options: dict[str, Any] = {
        "device": "cpu", "name": "Fake CPU", "threads": 1, "copy_gbps": 10.0,
        "matmul_tflops": {"float32": 0.1, "bfloat16": 0.2}, "cache_bytes": 1024,
    }  # fmt: skip
    return Machine(**(options | changes))


def row(**changes: Any) -> Row:
    """A row of the layer_norm op that took 2 ms."""
    options: dict[str, Any] = {
        "op": "layer_norm", "mode": "forward", "shape": "eva02-b16@224 b8", "dtype": "float32", "device": "cpu",
        "candidate": "evakernels cpu", "kind": "ours", "version": "0.1.0", "sizes": {"batch": 8, "tokens": 197},
        "samples_ms": [[2.0, 2.1, 1.9], [2.0, 2.0, 2.2]], "bytes": 1e7, "floor_ms": 1.0,
    }  # fmt: skip
    return Row(**(options | changes))
