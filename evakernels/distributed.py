"""Collectives with gradients, for losses over the global batch of all ranks.

The rule: a loss has the value over the global batch on every rank, and its gradient is world_size times this
rank's contribution. Averaged over ranks, as data-parallel training does, the contributions add up to the
exact gradient. An all-reduce gives all ranks the same bits, so the value is the same on each.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ._modes import is_transformed
from .reference import accumulation_dtype

# Names of torch 2.13 and of those before it.
_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


Group = dist.ProcessGroup | Literal[False] | None
"""The ranks of the global batch: a process group, None for all ranks, False for this rank alone."""


def resolved(op: str, group: Group) -> dist.ProcessGroup | None:
    """Returns the process group that `group` means; None for this rank alone, as before `init_process_group`.

    Raises `ValueError` for a group before `init_process_group`.
    """
    initialized = dist.is_available() and dist.is_initialized()
    if group is None:
        return dist.group.WORLD if initialized and dist.get_world_size() > 1 else None
    if group is False:
        return None
    if not initialized:
        raise ValueError(f"{op}: group must be None or False before init_process_group, got {group!r}")
    return group


def rank_and_size(op: str, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Returns rank and world size in a resolved `group`; (0, 1) for None.

    Raises `ValueError` if this rank isn't in the group, and `RuntimeError` for several ranks under forward-mode
    differentiation or functorch's transforms.
    """
    if group is None:
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(
            f"{op}: group must contain this rank, or be None for all ranks or False for this one alone, got {group}"
        )
    world_size = dist.get_world_size(group)
    if world_size > 1 and is_transformed():
        raise RuntimeError(
            f"{op}: group must be False, this rank alone, under forward-mode differentiation and functorch's "
            f"transforms (torch.func), got {world_size} ranks"
        )
    return rank, world_size


def gather_rows(
    op: str, name: str, rows: Tensor, group: dist.ProcessGroup | None, counts: Sequence[int] | None = None
) -> tuple[Tensor, int]:
    """Returns the rows of all ranks in rank order, and the index of this rank's first row.

    Ranks may have unequal numbers of rows, `counts`. Without `counts` the ranks exchange them, and the host waits for
    the device. The owner of a row gets the sum of all ranks' gradients of it.

    Raises `ValueError` on every rank if the widths differ, if only some ranks require a gradient, or if no rank has
    rows: a collective would hang or mix up the rows. Also if `counts` contradict this rank's rows or the group's size.
    """
    rank, world_size = rank_and_size(op, group)
    if counts is not None and (len(counts) != world_size or counts[rank] != len(rows)):
        raise ValueError(
            f"{op}: counts must be a number for each of {world_size} ranks, {len(rows)} for rank {rank} as {name} has "
            f"rows, got {list(counts)}"
        )
    if world_size == 1:
        return rows, 0
    counts = _agreed_counts(op, name, rows, group) if counts is None else list(counts)
    if not any(counts):
        raise ValueError(f"{op}: {name} must have rows on one rank at least, got none on {world_size}")
    gathered: Tensor = _GatherRows.apply(rows, counts, group)  # type: ignore[no-untyped-call]
    return gathered, sum(counts[:rank])


def _agreed_counts(op: str, name: str, rows: Tensor, group: dist.ProcessGroup | None) -> list[int]:
    needs_grad = rows.requires_grad and torch.is_grad_enabled()
    gathered = _all_gather(torch.tensor([*rows.shape, needs_grad], device=rows.device), group).tolist()
    shapes, needing = [entry[:-1] for entry in gathered], [bool(entry[-1]) for entry in gathered]
    if any(shape[1:] != shapes[0][1:] for shape in shapes):
        listed = ", ".join(f"{shape} on rank {rank}" for rank, shape in enumerate(shapes))
        raise ValueError(f"{op}: {name} must have the same width on every rank, got {listed}")
    if len(set(needing)) > 1 and any(shape[0] for shape in shapes):
        listed = ", ".join(str(rank) for rank, needed in enumerate(needing) if needed)
        raise ValueError(f"{op}: {name} must require a gradient on all ranks or none, got rank {listed} alone")
    return [shape[0] for shape in shapes]


def logsumexp_of_ranks(x: Tensor, summand: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the ranks of each element of `x` `[n]`, and the sum of `summand` `[]`; float64, no gradient.

    Two all-reduces, of the maxima and of the exponentials relative to them, as float64 may not hold the exponentials.
    """
    highest = x.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    # Subtracting an infinite maximum would turn infinite numbers into NaN.
    shift = highest.where(highest.isfinite(), 0).double()
    sums = torch.cat(((x - shift).exp_(), summand.double()[None]))
    dist.all_reduce(sums, group=group)
    return sums[:-1].log() + shift, sums[-1]


def sum_of_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sums `x` over the ranks; the gradient of this rank's `x` is world_size times the sum's."""
    if group is None:
        return x
    total: Tensor = _SumOfRanks.apply(x, group)  # type: ignore[no-untyped-call]
    return total


def _all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    parts = x.new_empty(dist.get_world_size(group), *x.shape)
    _gather(parts.flatten(0, 1) if x.dim() else parts, x.contiguous(), group=group)
    return parts


class _GatherRows(torch.autograd.Function):
    """Collectives need equal parts, so ranks with fewer rows pad them with zeros."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.counts, ctx.group, ctx.count = counts, group, len(rows)
        parts = _all_gather(_pad_rows(rows, max(counts)), group)
        if min(counts) == max(counts):
            return parts.flatten(0, 1)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        height, dtype = max(ctx.counts), gradient.dtype
        gradient = gradient.to(accumulation_dtype(gradient))  # sums over ranks aren't rounded on the way
        if min(ctx.counts) != height:
            gradient = torch.cat([_pad_rows(part, height) for part in gradient.split(ctx.counts)])
        local = gradient.new_empty(height, gradient.shape[1])
        _scatter(local, gradient.contiguous(), group=ctx.group)
        return local[: ctx.count].to(dtype), None, None


def _pad_rows(rows: Tensor, height: int) -> Tensor:
    return rows if len(rows) == height else F.pad(rows, (0, 0, 0, height - len(rows)))


class _SumOfRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.factor = dist.get_world_size(group)
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradient, None
