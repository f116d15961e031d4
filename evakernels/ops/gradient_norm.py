"""The norm of all gradients together, which stays on the device."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evakernels.ops import _check, _tensor_lists
from evakernels.ops._op import define
from evakernels.ops._shards import groups_of, local, sum_over
from evakernels.reference import gradient_norm as reference
from evakernels.reference._numerics import accumulation_dtype


def gradient_norm(grads: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all `grads` as one vector, in one call; what `torch.nn.utils.get_total_norm` computes.

    Nothing waits for the device. `max(norm / bound, 1)` as the `grad_scale` of `adamw_update` or `lamb_update`
    clips the gradients (Pascanu et al. 2013) without a pass over them.

    Args:
        grads: at least one tensor, any shapes, dense; float64, float32, bfloat16 or float16, also mixed. Of
            DTensors every process gives its part, and gets the norm of the whole.

    Returns:
        0-D, float32 (float64 when a gradient is float64). Squares are summed in that dtype, so a float32 norm
        is infinite from 2^64 on.

    Raises:
        TypeError: for a dtype or layout that isn't accepted.
        ValueError: for an empty list or several devices.

    Examples:
        >>> norm = evakernels.gradient_norm([torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])])
        >>> norm
        tensor(5.)
        >>> grad_scale = (norm / 2.0).clamp(min=1)  # for `adamw_update`, which then clips to 2
    """
    op = "gradient_norm"
    _tensor_lists.sequence(op, "grads", grads)
    if not grads:
        raise ValueError(f"{op}: grads is empty; expected at least one tensor")
    for i, grad in enumerate(grads):
        _check.floating(op, **{f"grads[{i}]": grad})
        if grad.layout != torch.strided:
            raise TypeError(f"{op}: grads[{i}] is {grad.layout}; accepted: dense tensors")
    _check.same_device(op, **{f"grads[{i}]": grad for i, grad in enumerate(grads)})
    parts: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for grad in grads:
        parts[groups_of(grad)].append(local(grad))
    if parts.keys() == {()}:
        norm: Tensor = _norm(grads)
        return norm
    return _norm_of_shards(parts)


def _norm_of_shards(parts: dict[tuple[Any, ...], list[Tensor]]) -> Tensor:
    norms = [_norm(part) for part in parts.values()]
    squares = [norm.double().square() for norm in norms]
    for square, groups in zip(squares, parts, strict=True):
        sum_over(square, groups)
    return torch.stack(squares).sum().sqrt().to(norms[0].dtype)


def _fake(grads: list[Tensor]) -> Any:
    return grads[0].new_empty((), dtype=accumulation_dtype(*grads))


_norm = define(reference.gradient_norm, fake=_fake)
