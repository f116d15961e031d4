"""Attention within the sequences of a packed batch: `rope_attention` for all sequences of a length at once.

If causal, lengths are rounded up, so that a batch has few of them: copies of a sequence's last token pad it, which no
token sees, without gradient.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import OPERATORS
from . import accumulation_dtype, rope_attention

CAUSAL_LENGTHS = 32
"""Multiple to which lengths of causal sequences are rounded up."""


def packed_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    token_index: Tensor | None,
    max_seqlen: int,
    causal: bool,
    interleaved: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    attend = OPERATORS.rope_attention_forward
    return packed_attention(attend, q, k, v, cu_seqlens, cos, sin, token_index, max_seqlen, causal, interleaved, scale)


def packed_attention(
    attend: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """Runs `attend`, attention of a padded batch, for the sequences of each length."""
    cos, sin, token_index, _, causal, interleaved, scale = options
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:2], dtype=accumulation_dtype(q))
    for batch in _batches(cu_seqlens, causal):
        inputs = (_grid(x, batch.rows) for x in (q, k, v))
        rotation = cos, sin, batch.token_index(cos, token_index), 0
        result = attend(*inputs, *rotation, causal, interleaved, scale)
        out = _filled(out, batch, result[0])
        lse = _filled(lse, batch, result[1].transpose(1, 2))
    return out, lse.T.contiguous()


def packed_attention_sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *options: Any) -> tuple[Tensor]:
    """Returns the output alone, by torch's attention of sequences padded to `max_seqlen`, a static shape."""
    cos, sin, token_index, max_seqlen, causal, interleaved, scale = options
    total = q.shape[0]
    if total == 0:
        return (torch.empty_like(q, memory_format=torch.contiguous_format),)
    firsts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    ended = ends.new_zeros(total + 1).index_add(0, ends, torch.ones_like(ends))
    sequence = ended.cumsum(0)[:-1]  # of each token
    places = torch.arange(total, device=q.device) - firsts[sequence]
    index = (places if token_index is None else token_index).unsqueeze(0)
    rotation = rope_attention.rotation_tables(q.unsqueeze(0), cos, sin, index, 0)
    q, k = (rope_attention.rotate_rounded(x.unsqueeze(0).transpose(1, 2), rotation, interleaved) for x in (q, k))
    q, k = (x.transpose(1, 2).squeeze(0) for x in (q, k))
    cells = torch.arange(max_seqlen, device=q.device)
    rows = (firsts.unsqueeze(1) + cells).clamp(max=total - 1)
    # Empty sequences keep one key: a softmax of nothing is NaN.
    mask = None if causal else (cells < (ends - firsts).clamp(min=1).unsqueeze(1))[:, None, None]
    shared = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    q, k, v = (_grid(x, rows).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, **shared)
    return (out.transpose(1, 2)[sequence, places],)


def packed_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    token_index: Tensor | None,
    max_seqlen: int,
    causal: bool,
    interleaved: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = [torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(3)]
    for batch in _batches(cu_seqlens, causal):
        rows = batch.rows
        cotangent = _grid(dout, rows).mul_(batch.inside[..., None, None])
        inputs = cotangent, *(_grid(x, rows) for x in (q, k, v, out)), _grid(lse.T, rows).transpose(1, 2).contiguous()
        rotation = cos, sin, batch.token_index(cos, token_index), 0
        grids = OPERATORS.rope_attention_backward(*inputs, *rotation, causal, interleaved, scale)
        gradients = [_filled(x, batch, grid) for x, grid in zip(gradients, grids, strict=True)]
    dq, dk, dv = gradients
    return dq, dk, dv


class _Batch(NamedTuple):
    """The sequences of one rounded length, padded with copies of their last tokens."""

    rows: Tensor  # [B, N]
    places: Tensor  # [B, N], index in the sequence
    inside: Tensor  # [B, N], False for padding

    def token_index(self, cos: Tensor | None, token_index: Tensor | None) -> Tensor | None:
        """The table rows of all cells; None without tables."""
        if cos is None:
            return None
        return self.places if token_index is None else token_index[self.rows]


def _batches(cu_seqlens: Tensor, causal: bool) -> Iterator[_Batch]:
    firsts, lengths = cu_seqlens[:-1].long(), cu_seqlens.long().diff()
    step = CAUSAL_LENGTHS if causal else 1
    rounded = (lengths + step - 1) // step * step
    for size in rounded.unique().tolist():
        if size > 0:
            members = rounded == size
            first, length = firsts[members].unsqueeze(1), lengths[members].unsqueeze(1)
            cells = torch.arange(min(size, int(length.max())), device=cu_seqlens.device)
            places = torch.minimum(cells, length - 1)
            yield _Batch(first + places, places, cells < length)


def _grid(x: Tensor, rows: Tensor) -> Tensor:
    """Rows `[T, ...]` -> `[B, N, ...]`."""
    grid: Tensor = x.index_select(0, rows.flatten()).unflatten(0, rows.shape)
    return grid


def _filled(x: Tensor, batch: _Batch, grid: Tensor) -> Tensor:
    """The inverse of `_grid`, without padding; in place unless a transform is active."""
    rows, inside = batch.rows, batch.inside
    where, values = (rows.flatten(), grid.flatten(0, 1)) if inside.all() else (rows[inside], grid[inside])
    # vmap can't write batched values into an unbatched tensor in place.
    put = torch.Tensor.index_copy if torch._C._are_functorch_transforms_active() else torch.Tensor.index_copy_
    return put(x, 0, where, values)
