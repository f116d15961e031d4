"""Attention for the last block of a tower, where one token of each sample is all that is used."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of one query a sample.

    Args:
        q: `[B, heads, head_dim]`.
        k, v: `[B, N, heads, head_dim]`, rotated where the tower has rotary positions.
        mask: bool `[B, N]`, the keys that the query sees; None for all.

    Returns:
        `[B, width]`.
    """
    seen = None if mask is None else mask[:, None, None]
    out = F.scaled_dot_product_attention(q.unsqueeze(2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen)
    return out.flatten(1)


def rotate_patches(x: Tensor, cos: Tensor, sin: Tensor, token_index: Tensor | None = None) -> Tensor:
    """`x` `[B, 1 + K, heads, head_dim]` with all tokens but the first rotated, as inside `rope_attention`.

    Args:
        cos, sin: `[num_patches, head_dim / 2]`.
        token_index: int64 `[B, K]`, the patches that `x` holds; None for all.
    """
    if token_index is not None:
        cos, sin = cos[token_index], sin[token_index]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    even, odd = x[:, 1:, :, 0::2], x[:, 1:, :, 1::2]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return torch.cat((x[:, :1], rotated.to(x.dtype)), 1)
