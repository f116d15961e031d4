"""Attention with the rotary embedding inside (Su et al. 2021; axial in 2-D as in EVA-02, Fang et al. 2023).

    q' = rotate(q), k' = rotate(k)      pair (a, b) of token n  ->  (a cos - b sin, a sin + b cos)
    s = scale * q' k'^T                 when causal, query i of N sees keys up to number i + M - N of M
    out = softmax(s) v,  lse = log(sum(exp(s)))      zeros and -inf of a query that sees no key

Query head h uses head h // (H // Hkv) of the keys and values; backward returns dk and dv for each query head.

The inverse rotation of gradients has the opposite sine. All intermediate values are float32 (float64 for float64
input), with scores [B, H, N, M].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import accumulation_dtype


def rope_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    token_index: Tensor | None,
    num_prefix: int,
    causal: bool,
    interleaved: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if k.shape[1] == 0:
        lse = q.new_full((q.shape[0], *q.shape[2:0:-1]), float("-inf"), dtype=accumulation_dtype(q))
        return q.new_zeros(q.shape), lse
    rotation, heads = rotation_tables(q, cos, sin, token_index, num_prefix), q.shape[2]
    q_rotated, k_rotated = (rotate(_heads_first(x, heads), rotation, interleaved) for x in (q, k))
    scores = _scores(q_rotated, k_rotated, scale, causal)
    # Without gradient, as the softmax of shifted scores is the same.
    highest = scores.detach().amax(-1, keepdim=True)
    if fully_masked := causal and q.shape[1] > k.shape[1]:
        highest = highest.masked_fill(highest == float("-inf"), 0.0)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.matmul(weights, _heads_first(v, heads)).div_(
        total.masked_fill(total == 0, 1.0) if fully_masked else total
    )
    lse = total.log().add_(highest).squeeze(-1)
    return _heads_last(out, q.dtype), lse


def rope_attention_sdpa(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor]:
    """Returns the output alone, computed by torch's attention, for which exported programs have kernels."""
    *tables, causal, interleaved, scale = options
    rotation = rotation_tables(q, *tables)
    q, k = (rotate_rounded(x.transpose(1, 2), rotation, interleaved) for x in (q, k))
    mask, fully_masked, v = None, 0, v.transpose(1, 2)
    if causal and q.shape[2] != k.shape[2]:
        fully_masked = max(q.shape[2] - k.shape[2], 0)  # leading queries without a key
        q = q[:, :, fully_masked:]
        mask = ~_hidden(q.shape[2], k.shape[2], q.device)
    shared = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, **shared
    )
    return (F.pad(out, (0, 0, fully_masked, 0)).transpose(1, 2).contiguous(),)


def rotate_rounded(x: Tensor, rotation: tuple[Tensor, Tensor] | None, interleaved: bool) -> Tensor:
    """`x` [B, H, N, D], rotated in accumulation precision and rounded again."""
    return x if rotation is None else rotate(x.to(accumulation_dtype(x)), rotation, interleaved).to(x.dtype)


def rope_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    token_index: Tensor | None,
    num_prefix: int,
    causal: bool,
    interleaved: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rotation, heads = rotation_tables(q, cos, sin, token_index, num_prefix), q.shape[2]
    q_rotated, k_rotated = (rotate(_heads_first(x, heads), rotation, interleaved) for x in (q, k))
    if causal and q.shape[1] > k.shape[1]:
        lse = lse.masked_fill(lse == float("-inf"), 0.0)
    weights = _scores(q_rotated, k_rotated, scale, causal).sub_(lse.unsqueeze(-1)).exp_()
    dout = _heads_first(dout, heads)
    dv = torch.matmul(weights.mT, dout)
    # The softmax's mean of dweights equals the sum of dout * out over the channels (Dao et al. 2022).
    mean = (dout * _heads_first(out, heads)).sum(-1, keepdim=True)
    dscores = torch.matmul(dout, _heads_first(v, heads).mT).sub_(mean).mul_(weights).mul_(scale)
    back = None if rotation is None else (rotation[0], -rotation[1])
    dq = rotate(torch.matmul(dscores, k_rotated), back, interleaved)
    dk = rotate(torch.matmul(dscores.mT, q_rotated), back, interleaved)
    return _heads_last(dq, q.dtype), _heads_last(dk, q.dtype), _heads_last(dv, q.dtype)


def rotation_tables(
    q: Tensor, cos: Tensor | None, sin: Tensor | None, token_index: Tensor | None, num_prefix: int
) -> tuple[Tensor, Tensor] | None:
    """cos and sin of every pair, broadcastable to [B, H, N, D / 2]; the prefix and indices of -1 aren't rotated."""
    if cos is None or sin is None:
        return None

    def spread(table: Tensor, prefix_value: float) -> Tensor:
        rows = table.to(accumulation_dtype(q))
        per_head = rows.dim() == 3
        if token_index is not None:
            rows = rows[..., token_index.clamp(min=0), :]
            unrotated = (token_index < 0).unsqueeze(-1)
            rows = rows.masked_fill(unrotated, prefix_value).movedim(-3, 0)  # [B, (H,) K, D / 2]
        if not per_head:
            rows = rows.unsqueeze(-3)
        prefix = rows.new_full((1,), prefix_value).expand(*rows.shape[:-2], num_prefix, rows.shape[-1])
        return torch.cat((prefix, rows), -2)

    return spread(cos, 1.0), spread(sin, 0.0)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor] | None, interleaved: bool) -> Tensor:
    """Rotates every pair of `x` [B, H, N, D]."""
    if rotation is None:
        return x
    cos, sin = rotation
    # Pairs (2i, 2i + 1), or (i, i + D / 2), without complex numbers, which ONNX lacks.
    a, b = x.unflatten(-1, (x.shape[-1] // 2, 2)).unbind(-1) if interleaved else x.chunk(2, -1)
    pair = a * cos - b * sin, a * sin + b * cos
    return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    scores = torch.matmul(q, k.mT).mul_(scale)
    if causal:
        scores.masked_fill_(_hidden(q.shape[-2], k.shape[-2], q.device), float("-inf"))
    return scores


def _hidden(queries: int, keys: int, device: torch.device) -> Tensor:
    """The mask [N, M] of keys that a query doesn't see; the last query sees all."""
    last_seen = torch.arange(keys - queries, keys, device=device)
    return torch.arange(keys, device=device) > last_seen.unsqueeze(1)


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """[B, N, H, D] to a contiguous [B, H, N, D] in accumulation precision, with shared heads repeated."""
    x = x.transpose(1, 2).contiguous().to(accumulation_dtype(x))
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _heads_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).transpose(1, 2).contiguous()
