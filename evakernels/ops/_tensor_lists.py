"""Checks of the lists of tensors that the optimizers' ops take."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _check

Tensors = Sequence[Tensor]


def tensors(op: str, params: Tensors, steps: Tensors, betas: Any, eps: float, **lists: Tensors) -> None:
    """Checks dense floating-point tensors with the shapes of `params` on one device, step counts, betas and eps."""
    lists_by_name = {"params": params, **lists}
    for name, values in lists_by_name.items():
        sequence(op, name, values)
    if not params:
        raise ValueError(f"{op}: params must be at least one tensor, got none")
    _check.floating(op, **{"params[0]": params[0]})
    device = params[0].device
    for name, values in lists_by_name.items():
        _length(op, name, values, params)
        for i, (tensor, param) in enumerate(zip(values, params, strict=True)):
            # Messages are made only when needed: for small tensors the checks take most of a step's time.
            is_float = isinstance(tensor, Tensor) and tensor.dtype in _check.FLOATS
            if is_float and tensor.layout == torch.strided and tensor.device == device and tensor.shape == param.shape:
                continue
            label = f"{name}[{i}]"
            _check.floating(op, **{label: tensor})
            if tensor.layout != torch.strided:
                raise TypeError(f"{op}: {label} must be dense, got {tensor.layout}")
            _check.same_device(op, **{"params[0]": params[0], label: tensor})
            _check.shape(op, label, tensor, tuple(param.shape), f"params[{i}].shape")
    _check_steps(op, params, steps)
    _check.betas(op, betas)
    _check.eps(op, eps)


def sequence(op: str, name: str, values: Any) -> None:
    """Raises `TypeError` unless `values` is a sequence; tensors, arrays and strings aren't accepted."""
    if not isinstance(values, list | tuple) and (isinstance(values, str | bytes) or not isinstance(values, Sequence)):
        raise TypeError(f"{op}: {name} must be a list of tensors, got {_check.kind(values)}")


def numbers(op: str, params: Tensors, **lists: Sequence[float]) -> None:
    """Checks lists of one number for each of `params`."""
    for name, values in lists.items():
        if not hasattr(values, "__len__"):
            raise TypeError(f"{op}: {name} must be a number for each of params, got {_check.kind(values)}")
        _length(op, name, values, params)


def rates(op: str, params: Tensors, lrs: Sequence[float] | Tensor) -> tuple[Sequence[float], Tensor | None]:
    """Checks learning rates, one for each of `params`; returns numbers, and the tensor if they are one."""
    if not isinstance(lrs, Tensor):
        numbers(op, params, lrs=lrs)
        return lrs, None
    _check.floating(op, lrs=lrs)
    _check.same_device(op, **{"params[0]": params[0]}, lrs=lrs)
    _check.shape(op, "lrs", lrs, (len(params),), "[n]")
    return [0.0] * len(params), lrs


def _check_steps(op: str, params: Tensors, steps: Tensors) -> None:
    """Checks the step counts: different 0-D float32 tensors on the device of `params`, one for each."""
    sequence(op, "steps", steps)
    _length(op, "steps", steps, params)
    if len(set(map(id, steps))) < len(steps):  # it would be incremented several times
        raise ValueError(f"{op}: steps must hold a different tensor for each of the params, got one twice")
    for i, step in enumerate(steps):
        if not isinstance(step, Tensor):
            raise _check.not_a_tensor(op, f"steps[{i}]", step)
        if step.dtype != torch.float32 or step.dim() > 0:
            raise TypeError(f"{op}: steps[{i}] must be 0-D float32, got {step.dtype} {tuple(step.shape)}")
        if step.device != params[0].device:
            _check.same_device(op, **{"params[0]": params[0], f"steps[{i}]": step})


def _length(op: str, name: str, values: Sequence[Any], params: Tensors) -> None:
    if len(values) != len(params):
        raise ValueError(f"{op}: {name} must be one for each of {len(params)} params, got {len(values)}")


def rounding(
    op: str, params: Tensors, seeds: Sequence[int], first_elements: Sequence[int]
) -> tuple[Sequence[int], Sequence[int]]:
    """Checks seeds and returns them with element numbers, by default 0; `params` must then be bfloat16."""
    if not seeds:
        if first_elements:
            raise ValueError(f"{op}: first_elements must be empty without seeds, got {list(first_elements)}")
        return seeds, first_elements
    first_elements = first_elements or [0] * len(params)
    for name, values in {"seeds": seeds, "first_elements": first_elements}.items():
        _length(op, name, values, params)
        if not all(0 <= value < 1 << 63 for value in values):
            raise ValueError(f"{op}: {name} must be from 0 to below 2^63, got {list(values)}")
    for i, param in enumerate(params):
        if param.dtype != torch.bfloat16:
            raise TypeError(f"{op}: params[{i}] must be torch.bfloat16 with seeds, got {param.dtype}")
    return seeds, first_elements


def flags(op: str, param: Tensor, **flags_by_name: Tensor | None) -> None:
    """Checks flags: None, or one element on the device of `param`."""
    for name, flag in flags_by_name.items():
        if flag is not None and not isinstance(flag, Tensor):
            raise _check.not_a_tensor(op, name, flag)
        if flag is not None and flag.numel() != 1:
            raise ValueError(f"{op}: {name} must have one element, got shape {tuple(flag.shape)}")
    _check.same_device(op, **{"params[0]": param}, **flags_by_name)
