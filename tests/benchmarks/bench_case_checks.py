"""What the tests of the shipped operations share: calling a candidate, float64 beside it, and stand-ins of packages."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.accuracy import as_double, gradient_leaves, relative_error, tensors
from benchmarks.operation import Draw, Function, Inputs, Operation, peers_of
from benchmarks.shapes import Shape

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def draw(op: Operation, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """A set of inputs on the CPU."""
    return op.inputs(shape, Draw(dtype, torch.device("cpu"), torch.Generator().manual_seed(seed)))


def outputs(function: Function, inputs: Inputs) -> list[Tensor]:
    """Outputs without a graph."""
    with torch.no_grad():
        return tensors(function(**inputs))


def gradients(op: Operation, function: Function, inputs: Inputs) -> list[Tensor]:
    """Gradients of the inputs that the operation names, for random gradients of the outputs."""
    leaves = gradient_leaves(op, inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    out = tensors(function(**inputs))
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) for o in out]
    return list(torch.autograd.grad(out, leaves, upstream))


def assert_exact(
    op: Operation,
    function: Function,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    training: bool = True,
    tolerance: float | None = None,
) -> None:
    """Outputs and gradients of `function` against float64."""
    inputs = draw(op, shape, dtype)
    exact = as_double(inputs)
    allowed = TOLERANCE[dtype] if tolerance is None else tolerance
    assert relative_error(outputs(function, inputs), outputs(op.eager, exact)) <= allowed
    if training:
        truth = gradients(op, op.eager, exact)
        assert relative_error(gradients(op, function, inputs), truth) <= allowed


def build(op: str, peer: str, shape: Shape) -> Function:
    """The function of a peer, installed or not."""
    (found,) = (candidate for candidate in peers_of(op) if candidate.name == peer)
    return found.build(shape)


def pretend_installed(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> None:
    """Makes modules of these names and members importable, and the packages that they lie in."""
    for path, members in modules.items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        module = ModuleType(path)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, path, module)
