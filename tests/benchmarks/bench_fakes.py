"""An operation small enough to be measured in a test, and results that nobody had to measure."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, float64

from benchmarks.operation import Cost, Draw, Function, Inputs, Operation, Work, _operations, _peers, peer, register
from benchmarks.results import Machine, Row
from benchmarks.shapes import Shape


def tanh_inputs(shape: Shape, draw: Draw) -> Inputs:
    """One tensor."""
    return {"x": draw.normal(shape.batch, shape.width)}


def tanh(x: Tensor) -> Tensor:
    """The operation."""
    return x.tanh()


def tanh_but_in_float64(error: Exception) -> Function:
    """The operation, with an error in the place of the truth."""

    def function(x: Tensor) -> Tensor:
        if x.dtype is float64:
            raise error
        return x.tanh()

    return function


def tanh_operation(**changes: Any) -> Operation:
    """tanh over a small tensor, a composition: no op of the library stands behind it."""
    options: dict[str, Any] = {
        "name": "tanh",
        "summary": "hyperbolic tangent",
        "inputs": tanh_inputs,
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
