"""Attention with the rotary embedding inside: launches the kernels of `_attention`, also for packed sequences."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from evakernels.reference.rope_attention import is_compact
from evakernels.triton._attention import PREFIX_ROWS, forward_kernel, key_kernel, query_kernel
from evakernels.triton._launch import in_vectors, on_device_of
from evakernels.tuning import config


@dataclass(frozen=True)
class Attention:
    """What the kernels of a call have in common.

    Attributes:
        q, k, v: `[B, N, H, D]`, or packed `[T, H, D]`.
        tokens: N, or the length of the longest sequence.
        offsets: of a packed batch, where its sequences begin and the last one ends.
        cos, sin, token_index, num_prefix, interleaved: as for `evakernels.rope_attention`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tokens: int
    causal: bool
    scale: float
    offsets: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    token_index: Tensor | None = None
    num_prefix: int = 0
    interleaved: bool = True

    def forward(self, op: str, lse: Tensor) -> Tensor:
        """Returns the output and fills `lse`."""
        out = torch.empty_like(self.q, memory_format=torch.contiguous_format)
        if out.numel() > 0:
            self._launch(forward_kernel, op, self.q, self.k, self.v, out, lse)
        return out

    def backward(self, op: str, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns dq, dk and dv."""
        dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
        dq, dk, dv = (torch.empty_like(out) for _ in range(3))
        if out.numel() > 0:
            delta = torch.empty_like(lse)
            given = dout, self.q, self.k, self.v
            self._launch(query_kernel, op, *given, out, lse, delta, dq)
            self._launch(key_kernel, op, *given, lse, delta, dk, dv)
        return dq, dk, dv

    def _launch(self, kernel: Any, op: str, *tensors: Tensor) -> None:
        head_dim = self.q.shape[-1]
        chosen = config(op, {"head_dim": head_dim, "tokens": self.tokens}, self.q)
        prefix = self._prefix(chosen["ROWS"], chosen["STEP"])
        walked = self.tokens - (self.num_prefix if prefix else 0)
        tiles = triton.cdiv(walked, chosen["ROWS"]) + (prefix > 0)
        vector, strides = self._strides()
        tables, sizes = self._tables()
        with on_device_of(self.q):
            kernel[(tiles * self.heads * self.samples,)](
                *tensors,
                *tables,
                self.offsets,
                *strides,
                *sizes,
                *(tiles, self.heads, self.tokens, self.num_prefix, self.scale * math.log2(math.e)),
                D=head_dim,
                PAIRS=None if self.cos is None else "interleaved" if self.interleaved else "halves",
                CAUSAL=self.causal,
                EVEN=not self.causal and self.offsets is None and walked % chosen["STEP"] == 0,
                PREFIX=prefix,
                VECTOR=vector,
                **chosen,
            )

    @property
    def heads(self) -> int:
        return self.q.shape[-2]

    @property
    def samples(self) -> int:
        return self.q.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    def _prefix(self, rows: int, step: int) -> int:
        """Rows of a prefix that stands apart; 0 where it had better go with the patches, for less work in all."""
        together = _padded(self.tokens, rows) * _padded(self.tokens, step)
        patches = self.tokens - self.num_prefix
        apart = (_padded(patches, rows) + PREFIX_ROWS.value) * (_padded(patches, step) + PREFIX_ROWS.value)
        if self.num_prefix == 0 or together <= apart:
            return 0
        return 1 if self.num_prefix == 1 else int(PREFIX_ROWS.value)

    def _strides(self) -> tuple[int, list[int]]:
        """VECTOR, and the strides of q, k and v, which count it, and of the log-sum-exps."""
        strides = [(x.stride(0) if self.offsets is None else 0, *x.stride()[-3:-1]) for x in (self.q, self.k, self.v)]
        vector, of_heads = in_vectors([s for three in strides for s in three], self.q.element_size())
        rows = self.q.shape[-3]
        of_lse = [self.heads * rows if self.offsets is None else 0, rows]
        return vector, of_heads + of_lse

    def _tables(self) -> tuple[list[Tensor | None], tuple[int, int | None]]:
        """cos, sin and token_index; the rows between the tables of two heads, and the grid of a compact table."""
        tables = [None if x is None else x.contiguous() for x in (self.cos, self.sin, self.token_index)]
        cos = tables[0]
        if cos is None or cos.dim() == 2:
            return tables, (0, None)
        return tables, (0, cos.shape[1]) if is_compact(cos, self.q.shape[-1]) else (cos.shape[1], None)


def dense_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With dense vectors: as they are where that holds, else copies."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return q, k, v


def _padded(tokens: int, tile: int) -> int:
    return -(-tokens // tile) * tile


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
    batch, tokens, heads, _ = q.shape
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    call = Attention(*dense_heads(q, k, v), tokens, causal, scale, None, cos, sin, token_index, num_prefix, interleaved)
    return call.forward("rope_attention_forward", lse), lse


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
    call = Attention(
        *dense_heads(q, k, v), q.shape[1], causal, scale, None, cos, sin, token_index, num_prefix, interleaved
    )
    return call.backward("rope_attention_backward", dout, out, lse)
