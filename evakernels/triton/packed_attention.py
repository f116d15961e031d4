"""Attention within the sequences of a packed batch; the kernels are those of `_attention`."""

import torch

from ..tuning import entry
from .rope_attention import Attention, dense_heads, draw_heads

CONFIGS = {
    80: {
        "packed_attention_forward": [
            entry(head_dim=64, tokens=64, itemsize=2, BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
            entry(head_dim=96, tokens=64, itemsize=2, BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=2),
            entry(head_dim=64, tokens=64, itemsize=4, BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2),
            entry(head_dim=96, tokens=64, itemsize=4, BLOCK_M=16, BLOCK_N=16, num_warps=8, num_stages=2),
        ],
        "packed_attention_backward": [
            entry(head_dim=64, tokens=64, itemsize=2, BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=2),
            entry(head_dim=96, tokens=64, itemsize=2, BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=2),
            entry(head_dim=64, tokens=64, itemsize=4, BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=2),
            entry(head_dim=96, tokens=64, itemsize=4, BLOCK_M=16, BLOCK_N=32, num_warps=8, num_stages=2),
        ],
    },
    90: {
        "packed_attention_backward": [
            entry(head_dim=64, tokens=64, itemsize=2, BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=2),
            entry(head_dim=96, tokens=64, itemsize=2, BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=1),
            entry(head_dim=64, tokens=64, itemsize=4, BLOCK_M=16, BLOCK_N=32, num_warps=8, num_stages=2),
            entry(head_dim=96, tokens=64, itemsize=4, BLOCK_M=16, BLOCK_N=32, num_warps=8, num_stages=3),
        ],
    },
    100: {
        "packed_attention_backward": [
            entry(head_dim=64, tokens=64, itemsize=2, BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=2),
            entry(head_dim=96, tokens=64, itemsize=2, BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=2),
            entry(head_dim=64, tokens=64, itemsize=4, BLOCK_M=16, BLOCK_N=32, num_warps=8, num_stages=2),
            entry(head_dim=96, tokens=64, itemsize=4, BLOCK_M=16, BLOCK_N=32, num_warps=8, num_stages=3),
        ],
    },
    120: {
        "packed_attention_backward": [
            entry(head_dim=64, tokens=64, itemsize=2, BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=2),
            entry(head_dim=96, tokens=64, itemsize=2, BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=2),
            entry(head_dim=64, tokens=64, itemsize=4, BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=2),
            entry(head_dim=96, tokens=64, itemsize=4, BLOCK_M=16, BLOCK_N=16, num_warps=8, num_stages=2),
        ],
    },
}
"""Launch configurations by compute capability; a GPU has those of the highest up to its own."""


def _call(q, k, v, cu_seqlens, cos, sin, token_index, max_seqlen, causal, interleaved, scale):
    heads, bounds, longest = dense_heads(q, k, v), cu_seqlens.contiguous(), min(max_seqlen, len(q))
    return Attention(*heads, longest, causal, scale, bounds, cos, sin, token_index, 0, interleaved)


def packed_attention_forward(q, k, v, *options):
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return _call(q, k, v, *options).forward("packed_attention_forward", lse), lse


def packed_attention_backward(dout, q, k, v, out, lse, *options):
    return _call(q, k, v, *options).backward("packed_attention_backward", dout, out, lse)


# --- calls that are timed and compiled for each entry of CONFIGS ------------------------------------------------------


def packed_attention_forward_calls(draw, head_dim, tokens):
    (q, k, v), tables = draw_heads(draw, head_dim, tokens)
    cu_seqlens = torch.arange(0, q.shape[0] * tokens + 1, tokens, device=draw.device)
    qkv = [x.flatten(0, 1) for x in (q, k, v)]
    options = tokens, True, True, head_dim**-0.5
    yield *qkv, cu_seqlens, None, None, None, *options
    index = torch.zeros(len(qkv[0]), dtype=torch.int64, device=draw.device)
    yield *qkv, cu_seqlens, *tables, index, *options


def packed_attention_backward_calls(draw, head_dim, tokens):
    for q, k, v, *rest in packed_attention_forward_calls(draw, head_dim, tokens):
        yield draw(*q.shape), q, k, v, draw(*q.shape), draw.statistic(draw.heads, len(q)), *rest
