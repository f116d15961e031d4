"""Collectives with gradients, for losses over the batch of all processes.

The rule: a loss has the value over the global batch on every rank, and its gradient is world_size times this
rank's contribution. Averaged over ranks, as data-parallel training does, the contributions add up to the
exact gradient. Partial results are gathered and then reduced by every rank in rank order, so that all get the
same bits.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_size(op: str, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This process's place in `group`; (0, 1) for None.

    Raises `ValueError` before `init_process_group`, or when the process isn't in the group.
    """
    if group is None:
        return 0, 1
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(f"{op}: group given, but torch.distributed is not initialized; call init_process_group first")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{op}: this process is not a member of group; accepted: None or a group that contains it")
    return rank, dist.get_world_size(group)


def gather_rows(op: str, name: str, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all ranks, in rank order; the owner of a row gets the sum of all ranks' gradients of it.

    Raises `ValueError`, on every rank, where the shapes differ: a collective would hang or mix up the rows.
    """
    if rank_and_size(op, group)[1] == 1:
        return rows
    shapes = _all_gather(torch.tensor(rows.shape, device=rows.device), group).tolist()
    if any(shape != shapes[0] for shape in shapes):
        listed = ", ".join(f"{shape} on rank {rank}" for rank, shape in enumerate(shapes))
        raise ValueError(f"{op}: {name} has shape {listed}; expected the same shape on every rank")
    gathered: Tensor = _GatherRows.apply(rows, group)  # type: ignore[no-untyped-call]
    return gathered


def gather_partials(op: str, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`x` of all ranks as `[world_size, *x.shape]`; this rank's part alone has a gradient, and keeps it."""
    rank, world_size = rank_and_size(op, group)
    if world_size == 1:
        return x[None]
    parts = _all_gather(x.detach(), group)
    return torch.cat([parts[:rank], x[None], parts[rank + 1 :]])


def scale_gradient(x: Tensor, factor: int) -> Tensor:
    """`x`, whose gradient is `factor` times as large."""
    return x if factor == 1 else x.detach() + factor * (x - x.detach())


def _all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    parts = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(parts), x.contiguous(), group=group)
    return parts


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _all_gather(rows, group).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        parts = list(gradient.contiguous().chunk(dist.get_world_size(ctx.group)))
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=ctx.group)
        return own, None
