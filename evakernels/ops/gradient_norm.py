"""The norm of all gradients together, which stays on the device."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import accumulation_dtype
from . import _check, _tensor_lists
from ._dtensors import local, shard_groups, sum_over

_PART = 2**17
"""Elements that a CPU sums at a time: over millions of float32 the error reaches the fourth digit."""


def gradient_norm(grads: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all `grads` as one vector, like `torch.nn.utils.get_total_norm`, without synchronisation.

    `max(norm / bound, 1)` as `grad_scale` of `adamw_update` or `lamb_update` clips the gradients (Pascanu et al. 2013).

    Args:
        grads: at least one dense tensor of any shape; float64, float32, bfloat16 or float16, also mixed, on one or
            several devices. For DTensors every rank gets the norm of the whole tensors.

    Returns:
        0-D, float32 (float64 if a gradient is float64), on the device of the first gradient. Squares are summed in
        that dtype, so a float32 norm is infinite from 2^64 on.

    Raises:
        TypeError: for a dtype or layout that isn't accepted.
        ValueError: for an empty list.

    Examples:
        >>> norm = evakernels.gradient_norm([torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])])
        >>> norm
        tensor(5.)
        >>> grad_scale = (norm / 2.0).clamp(min=1)  # for `adamw_update`, which then clips to 2
    """
    op = "gradient_norm"
    _tensor_lists.sequence(op, "grads", grads)
    if not grads:
        raise ValueError(f"{op}: grads must be at least one tensor, got none")
    for i, grad in enumerate(grads):
        _check.floating(op, **{f"grads[{i}]": grad})
        if grad.layout != torch.strided:
            raise TypeError(f"{op}: grads[{i}] must be dense, got {grad.layout}")
    dtype, device = accumulation_dtype(*grads), grads[0].device
    alike: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for grad in grads:
        shard = local(grad)
        parts = shard.reshape(-1).split(_PART) if shard.is_cpu and shard.numel() > _PART else (shard,)
        alike[grad.device, grad.dtype, shard_groups(grad)] += parts
    squares = []
    for (_, _, groups), parts in alike.items():
        norms = torch.stack(torch._foreach_norm(parts, 2, dtype=dtype))
        squares.append(norms.double().square().sum())
        sum_over(squares[-1], groups)
    # A non-blocking copy to the host may be read before it has arrived.
    return torch.stack([s.to(device, non_blocking=device.type != "cpu") for s in squares]).sum().sqrt().to(dtype)
