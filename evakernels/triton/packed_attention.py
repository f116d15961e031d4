"""Attention within the sequences of a packed batch; the kernels are those of `_attention`."""

import torch

from .rope_attention import Attention, dense_heads


def _call(q, k, v, cu_seqlens, cos, sin, token_index, max_seqlen, causal, interleaved, scale):
    heads, bounds, longest = dense_heads(q, k, v), cu_seqlens.contiguous(), min(max_seqlen, len(q))
    return Attention(*heads, longest, causal, scale, bounds, cos, sin, token_index, 0, interleaved)


def packed_attention_forward(q, k, v, *options):
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return _call(q, k, v, *options).forward("packed_attention_forward", lse), lse


def packed_attention_backward(dout, q, k, v, out, lse, *options):
    return _call(q, k, v, *options).backward("packed_attention_backward", dout, out, lse)
