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


_ZERO = 1e-12
"""What is this small beside the other tensors is float64's rounding of a zero, such as the gradient of keys' biases."""


def relative_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative RMS error, ||found - truth|| / ||truth||, of several tensors; NaN if any has one.

    That of a tensor which should be zero is relative to the largest of the others, by RMS of their elements.
    """
    if len(found) != len(truth):
        raise ValueError(f"{len(found)} tensors came back where {len(truth)} were expected")
    scales = [_rms(exact) for exact in truth]
    largest = max(scales, default=0.0)
    errors = []
    for ours, exact, scale in zip(found, truth, scales, strict=True):
        if ours.shape != exact.shape:
            raise ValueError(f"shape {tuple(ours.shape)} came back where {tuple(exact.shape)} was expected")
        error = _rms(ours.double() - exact.double())
        errors.append(error / ((scale if scale > _ZERO * largest else largest) or 1.0))
    return float(torch.tensor(errors).max())  # unlike max(), torch's keeps a NaN


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().norm().item() / max(tensor.numel(), 1) ** 0.5)


def _convert(value: Any) -> Any:
    if isinstance(value, Tensor):
        detached = value.detach()
        converted = detached.double() if detached.is_floating_point() else detached
        return converted.requires_grad_(value.requires_grad)
    if isinstance(value, list | tuple):
        return type(value)(_convert(item) for item in value)
    return value
