"""Errors against float64 on the same inputs, of a candidate and of plain PyTorch in the same dtype.

A wrong result gets no time. It has another shape or dtype, or an error beyond `allowed_error`, which rounding doesn't
explain.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.operation import Function, Inputs, Operation, Outputs

ERROR_RULE = {"forward": 2.0, "training": 3.0}
"""Largest error of this library's ops, as a multiple of the error of plain PyTorch in the same dtype."""
PEER_RULE = 10.0
"""The same for peers, of errors beyond `ROUGHEST`."""
ROUGHEST = 2.0**-8
"""One rounding to bfloat16: a peer that rounds to it, or to TF32, where plain PyTorch doesn't is inexact, not wrong."""
UNRELATED = 0.5
"""The error of a result that has little to do with the truth, whatever the dtype."""
QUANTIZED = 0.25
"""The error that candidates of fewer bits may have: embeddings with a cosine of 0.97."""
FINEST = 2.0**-24
"""One rounding to float32: a smaller error is none."""
_ZERO = 1e-12
"""A tensor this small relative to the others is float64's rounding of a zero, such as the gradient of keys' biases."""

Form = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""


class WrongResultError(Exception):
    """A candidate computes something else."""


def tensors(value: Outputs) -> list[Tensor]:
    """The tensors in an input or output: one, or the elements of a list or tuple without None."""
    if isinstance(value, Tensor):
        return [value]
    return [item for item in value if isinstance(item, Tensor)] if isinstance(value, list | tuple) else []


def as_double(inputs: Inputs) -> Inputs:
    """The same inputs with every floating-point tensor in float64."""
    return {name: _convert(value) for name, value in inputs.items()}


def _convert(value: Any) -> Any:
    if isinstance(value, Tensor):
        detached = value.detach()
        converted = detached.double() if detached.is_floating_point() else detached
        return converted.requires_grad_(value.requires_grad)
    if isinstance(value, list | tuple):
        return type(value)(_convert(item) for item in value)
    return value


def forward_outputs(function: Function, inputs: Inputs) -> list[Tensor]:
    """The tensors that the function returns, without a graph."""
    with torch.no_grad():
        return tensors(function(**inputs))


def gradient_leaves(op: Operation, inputs: Inputs) -> list[Tensor]:
    """The inputs that get gradients; lists of tensors are flattened."""
    return [leaf for name in op.gradients for leaf in tensors(inputs[name])]


def forms(values: Sequence[Tensor]) -> list[Form]:
    """The shape and dtype of each."""
    return [(tuple(value.shape), value.dtype) for value in values]


def check_forms(found: Sequence[Form], expected: Sequence[Form]) -> None:
    """Raises `WrongResultError` where a tensor is missing, or has another shape or dtype."""
    if len(found) != len(expected):
        raise WrongResultError(f"{len(found)} tensors came back where {len(expected)} were expected")
    for (shape, dtype), (right_shape, right_dtype) in zip(found, expected, strict=True):
        if shape != right_shape:
            raise WrongResultError(f"shape {shape} came back where {right_shape} was expected")
        if dtype != right_dtype:
            raise WrongResultError(f"{dtype} came back where {right_dtype} was expected")


def luck(values: Sequence[Tensor], dtype: torch.dtype) -> float:
    """The error that plain PyTorch may be below by mere luck: of a lone number, such as a loss, a few roundings."""
    return max(FINEST, 4 * torch.finfo(dtype).eps if all(value.numel() == 1 for value in values) else 0.0)


def allowed_error(kind: str, mode: str, baseline: float | None, least: float = FINEST) -> float:
    """The largest error of a result that isn't wrong.

    Args:
        kind: `ours`, `baseline`, `peer` or `quantized`.
        mode: `forward` for an error of outputs, `training` for one of gradients.
        baseline: the error of plain PyTorch in the same dtype; None or NaN where it is unknown.
        least: an error that is accepted in any case; see `luck`.
    """
    if baseline is None or math.isnan(baseline):
        return UNRELATED
    ours = max(ERROR_RULE[mode] * baseline, least)
    if kind == "ours":
        return ours
    return max(ours, min(PEER_RULE * baseline, UNRELATED), QUANTIZED if kind == "quantized" else ROUGHEST)


def relative_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative RMS error, ||found - truth|| / ||truth||, of several tensors; NaN if any has one.

    The error of a tensor of zeros is relative to the largest of the others, by RMS of their elements.
    """
    scales = [_rms(exact) for exact in truth]
    largest = max(scales, default=0.0)
    errors = []
    for ours, exact, scale in zip(found, truth, scales, strict=True):
        if ours.shape != exact.shape:  # else it might be broadcast
            raise WrongResultError(f"shape {tuple(ours.shape)} came back where {tuple(exact.shape)} was expected")
        error = _rms(ours.double() - exact.double())
        errors.append(error / ((scale if scale > _ZERO * largest else largest) or 1.0))
    return float(torch.tensor(errors).max())  # unlike max(), torch's keeps a NaN


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().norm().item() / max(tensor.numel(), 1) ** 0.5)
