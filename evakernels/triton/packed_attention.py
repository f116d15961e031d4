"""Attention within the sequences of a packed batch; the kernels are those of `_attention`."""

import torch
from torch import Tensor

from evakernels.triton.rope_attention import Attention, dense_heads


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
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    call = Attention(
        *dense_heads(q, k, v),
        min(max_seqlen, len(q)),
        causal,
        scale,
        cu_seqlens.contiguous(),
        cos,
        sin,
        token_index,
        0,
        interleaved,
    )
    return call.forward("packed_attention_forward", lse), lse


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
    call = Attention(
        *dense_heads(q, k, v),
        min(max_seqlen, len(q)),
        causal,
        scale,
        cu_seqlens.contiguous(),
        cos,
        sin,
        token_index,
        0,
        interleaved,
    )
    return call.backward("packed_attention_backward", dout, out, lse)
