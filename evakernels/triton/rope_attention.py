"""Attention with the rotary embedding inside; the kernels are those of `_attention`."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from evakernels.triton._attention import forward_kernel, key_kernel, query_kernel
from evakernels.triton._launch import on_device_of
from evakernels.tuning import config

MAX_HEAD_DIM = 128
"""A program holds its rows in registers."""


def reasons(op: str, *args: Any) -> list[str]:
    q, scale = args["backward" in op], args[-1]
    found = []
    if not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
        found.append(f"head_dim {q.shape[-1]} is not in 1 to {MAX_HEAD_DIM}")
    if isinstance(scale, float) and not scale > 0:
        found.append(f"scale {scale} is not positive")
    return found


def rope_attention_forward(q, k, v, cos, sin, token_index, num_prefix, causal, interleaved, scale):
    q, k, v = (_dense_vectors(x) for x in (q, k, v))
    batch, tokens, heads, D = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    launch = Launch(q, k, v, lse, cos, sin, token_index, None, tokens, num_prefix, causal, interleaved, scale)
    launch(forward_kernel, "rope_attention_forward", q, k, v, out, lse)
    return out, lse


def rope_attention_backward(dout, q, k, v, out, lse, cos, sin, token_index, num_prefix, causal, interleaved, scale):
    q, k, v = (_dense_vectors(x) for x in (q, k, v))
    batch, tokens, heads, D = q.shape
    dq, dk, dv = (torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(3))
    if out.numel() == 0:
        return dq, dk, dv
    dout, out, delta = dout.contiguous(), out.contiguous(), torch.empty_like(lse)
    launch = Launch(q, k, v, lse, cos, sin, token_index, None, tokens, num_prefix, causal, interleaved, scale)
    launch(query_kernel, "rope_attention_dq", dout, q, k, v, out, lse, delta, dq)
    launch(key_kernel, "rope_attention_dkdv", dout, q, k, v, lse, delta, dk, dv)
    return dq, dk, dv


def _dense_vectors(x):
    return x if x.stride(-1) == 1 else x.contiguous()


class Launch:
    def __init__(self, q, k, v, lse, cos, sin, token_index, offsets, tokens, num_prefix, causal, interleaved, scale):
        self.tokens, self.num_prefix, self.causal, self.scale = tokens, num_prefix, causal, scale
        self.offsets = offsets
        self.q = q
        self.batch = q.shape[0] if offsets is None else len(offsets) - 1
        self.heads, self.D = q.shape[-2:]
        strides = [s for x in (q, k, v) for s in ((x.stride(0) if offsets is None else 0), *x.stride()[-3:-1])]
        self.vector = math.gcd(8, *strides)
        self.strides = [s // self.vector for s in strides]
        self.strides += lse.stride()[:2] if offsets is None else (0, lse.stride(0))
        self.pairs = None if cos is None else "interleaved" if interleaved else "halves"
        self.grid, head_stride = None, 0
        if cos is not None:
            cos, sin = cos.contiguous(), sin.contiguous()
            if cos.shape[-1] == self.D // 4:
                self.grid = cos.shape[1]
            elif cos.dim() == 3:
                head_stride = cos.stride(0)
            token_index = None if token_index is None else token_index.contiguous()
        self.tables = cos, sin, token_index
        self.strides.append(head_stride)

    def __call__(self, kernel, op, *tensors):
        tokens = self.tokens
        chosen = config(op, {"head_dim": self.D, "tokens": tokens}, self.q)
        rows, step = chosen["ROWS"], chosen["STEP"]
        prefix = self.prefix(rows, step)
        start = self.num_prefix if prefix else 0
        tiles = triton.cdiv(tokens - start, rows) + bool(prefix)
        even = {} if kernel is key_kernel else {"EVEN": self.offsets is None and (tokens - start) % step == 0}
        with on_device_of(self.q):
            return kernel[(self.batch * self.heads * tiles,)](
                *tensors, *self.tables, self.offsets, *self.strides, self.grid, tiles, self.heads, tokens, self.num_prefix,
                self.scale * math.log2(math.e), D=self.D, PAIRS=self.pairs, CAUSAL=self.causal, **even, PREFIX=prefix, VECTOR=self.vector, **chosen)

    def prefix(self, rows, step):
        p, tokens = self.num_prefix, self.tokens
        if p == 0:
            return 0
        up = lambda n, t: triton.cdiv(n, t) * t
        together = up(tokens, rows) * up(tokens, step)
        apart = (up(tokens - p, rows) + 16) * (up(tokens - p, step) + 16)
        return 0 if together <= apart else 1 if p == 1 else 16
