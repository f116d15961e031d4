"""Errors against float64 on the same inputs, the candidate's beside those of plain PyTorch in the same dtype."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.operation import Function, Inputs, Operation, Outputs


def as_double(inputs: Inputs) -> Inputs:
    """The same inputs with every floating-point tensor in float64."""
    return {name: _convert(value) for name, value in inputs.items()}


def forward_outputs(function: Function, inputs: Inputs) -> list[Tensor]:
    """What the function returns, without a graph."""
    with torch.no_grad():
        return tensors(function(**inputs))


def gradient_leaves(op: Operation, inputs: Inputs) -> list[Tensor]:
    """The inputs that get gradients; lists of tensors are spread out."""
    return [leaf for name in op.gradients for leaf in tensors(inputs[name])]


def tensors(value: Outputs) -> list[Tensor]:
    """The tensors in an input or output: one, or those of a list or tuple; None is left out."""
    if isinstance(value, Tensor):
        return [value]
    return [item for item in value if isinstance(item, Tensor)] if isinstance(value, list | tuple) else []


def relative_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative RMS error, ||found - truth|| / ||truth||, of several tensors; NaN if any has one."""
    if len(found) != len(truth):
        raise ValueError(f"{len(found)} tensors came back where {len(truth)} were expected")
    errors = []
    for ours, exact in zip(found, truth, strict=True):
        if ours.shape != exact.shape:
            raise ValueError(f"shape {tuple(ours.shape)} came back where {tuple(exact.shape)} was expected")
        scale = exact.double().norm().item()
        error = (ours.double() - exact.double()).norm().item()
        errors.append(error / scale if scale else error)
    return float(torch.tensor(errors).max())  # unlike max(), torch's keeps a NaN


def _convert(value: Any) -> Any:
    if isinstance(value, Tensor):
        detached = value.detach()
        converted = detached.double() if detached.is_floating_point() else detached
        return converted.requires_grad_(value.requires_grad)
    if isinstance(value, list | tuple):
        return type(value)(_convert(item) for item in value)
    return value
