"""Attention within the sequences of a packed batch: that of `rope_attention`, for all sequences of a length at once.

When causal, a sequence may be followed by anything, as no token of it sees that. Then lengths are rounded up, so that
a batch has few of them; copies of a sequence's last token fill the cells behind it, and get no gradient.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evakernels.reference._numerics import accumulation_dtype

CAUSAL_LENGTHS = 32
"""What the lengths of causal sequences are rounded up to a multiple of."""

_UNROTATED = (None, None, None, 0)


def packed_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, max_length: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    attend = torch.ops.evakernels.rope_attention_forward
    return packed_attention(attend, q, k, v, offsets, max_length, causal, scale)


def packed_attention(
    attend: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_length: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`attend` is what each batch of sequences is given to."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:2], dtype=accumulation_dtype(q))
    for rows, inside in _batches(offsets, causal):
        given = (_grid(x, rows) for x in (q, k, v))
        result = attend(*given, *_UNROTATED, causal, False, scale)
        out = _filled(out, rows, inside, result[0])
        lse = _filled(lse, rows, inside, result[1].transpose(1, 2))
    return out, lse.T.contiguous()


def packed_attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, max_length: int, causal: bool, scale: float
) -> tuple[Tensor]:
    """The output alone, by torch's attention over all sequences at once, each as long as the longest may be.

    So no shape depends on what `offsets` hold.
    """
    total = q.shape[0]
    if total == 0:
        return (torch.empty_like(q, memory_format=torch.contiguous_format),)
    firsts, ends = offsets[:-1].long(), offsets[1:].long()
    cells = torch.arange(max_length, device=q.device)
    rows = (firsts.unsqueeze(1) + cells).clamp(max=total - 1)
    # Of a sequence without tokens one key is left: a softmax of nothing isn't a number.
    seen = None if causal else (cells < (ends - firsts).clamp(min=1).unsqueeze(1))[:, None, None]
    q, k, v = (_grid(x, rows).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal, scale=scale).transpose(1, 2)
    ended = ends.new_zeros(total + 1).index_add(0, ends, torch.ones_like(ends))
    sequence = ended.cumsum(0)[:-1]  # of each token
    return (out[sequence, torch.arange(total, device=out.device) - firsts[sequence]],)


def packed_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    max_length: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for rows, inside in _batches(offsets, causal):
        cotangent = _grid(dout, rows).mul_(inside[..., None, None])
        given = cotangent, *(_grid(x, rows) for x in (q, k, v, out)), _grid(lse.T, rows).transpose(1, 2).contiguous()
        found = torch.ops.evakernels.rope_attention_backward(*given, *_UNROTATED, causal, False, scale)
        gradients = [_filled(x, rows, inside, grid) for x, grid in zip(gradients, found, strict=True)]
    dq, dk, dv = gradients
    return dq, dk, dv


def _batches(offsets: Tensor, causal: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Of the sequences of each length: their rows `[B, N]`, and which of these cells are theirs."""
    firsts, lengths = offsets[:-1].long(), offsets.long().diff()
    step = CAUSAL_LENGTHS if causal else 1
    rounded = (lengths + step - 1) // step * step
    for size in rounded.unique().tolist():
        if size > 0:
            those = rounded == size
            first, length = firsts[those].unsqueeze(1), lengths[those].unsqueeze(1)
            cells = torch.arange(min(size, int(length.max())), device=offsets.device)
            yield first + torch.minimum(cells, length - 1), cells < length


def _grid(x: Tensor, rows: Tensor) -> Tensor:
    """Rows `[T, ...]` -> `[B, N, ...]`."""
    grid: Tensor = x.index_select(0, rows.flatten()).unflatten(0, rows.shape)
    return grid


def _filled(x: Tensor, rows: Tensor, inside: Tensor, grid: Tensor) -> Tensor:
    """The inverse, in `x` itself unless a transform is at work: of the cells that are `inside`."""
    where, values = (rows.flatten(), grid.flatten(0, 1)) if inside.all() else (rows[inside], grid[inside])
    # Of a sample alone vmap doesn't know how to write those of several into it.
    put = torch.Tensor.index_copy if torch._C._are_functorch_transforms_active() else torch.Tensor.index_copy_
    return put(x, 0, where, values)
