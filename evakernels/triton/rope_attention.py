"""Attention with the rotary embedding inside: launches the kernels of `_attention`, also for packed sequences."""

import math
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from ..tuning import config, entry
from ._attention import PREFIX_ROWS, Form, attention_kernel
from ._launch import dense, device_guard, float32_products, in_vectors

_MOST_ROW_STRIDE = 1 << 23
"""Elements, for 32-bit offsets in tiles of 128 rows."""

_FORWARD_FLOAT32 = [
    entry(head_dim=64, tokens=257, itemsize=4, BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=2),
    entry(head_dim=96, tokens=257, itemsize=4, BLOCK_M=16, BLOCK_N=16, num_warps=8, num_stages=2),
]
_FORWARD = [
    entry(head_dim=64, tokens=257, itemsize=2, BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
    entry(head_dim=96, tokens=257, itemsize=2, BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=2),
    *_FORWARD_FLOAT32,
]
_BACKWARD = [
    entry(head_dim=64, tokens=257, itemsize=2, BLOCK_M=16, BLOCK_N=64, num_warps=8, num_stages=1),
    entry(head_dim=96, tokens=257, itemsize=2, BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=2),
    entry(head_dim=64, tokens=257, itemsize=4, BLOCK_M=16, BLOCK_N=32, num_warps=8, num_stages=2),
    entry(head_dim=96, tokens=257, itemsize=4, BLOCK_M=16, BLOCK_N=16, num_warps=8, num_stages=2),
]
CONFIGS = {
    80: {"rope_attention_forward": _FORWARD, "rope_attention_backward": _BACKWARD},
    90: {
        "rope_attention_forward": [
            entry(head_dim=64, tokens=257, itemsize=2, BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2),
            entry(head_dim=96, tokens=257, itemsize=2, BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2),
            *_FORWARD_FLOAT32,
        ],
        "rope_attention_backward": [
            entry(head_dim=64, tokens=257, itemsize=2, BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2),
            entry(head_dim=96, tokens=257, itemsize=2, BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=2),
            entry(head_dim=64, tokens=257, itemsize=4, BLOCK_M=16, BLOCK_N=32, num_warps=8, num_stages=2),
            entry(head_dim=96, tokens=257, itemsize=4, BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=2),
        ],
    },
    100: {"rope_attention_forward": _FORWARD},
    120: {
        "rope_attention_forward": [
            entry(head_dim=64, tokens=257, itemsize=2, BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
            entry(head_dim=96, tokens=257, itemsize=2, BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=1),
            *_FORWARD_FLOAT32,
        ],
        "rope_attention_backward": _BACKWARD,
    },
}
"""Launch configurations by compute capability; a GPU has those of the highest up to its own."""


@dataclass(frozen=True)
class Attention:
    """The arguments of a call, as for `evakernels.rope_attention`.

    Attributes:
        q: `[B, N, H, D]`, or packed `[T, H, D]`.
        k, v: `[B, M, Hkv, D]`, or packed `[T, Hkv, D]`.
        max_seqlen: N, or the length of the longest sequence.
        cu_seqlens: bounds of a packed batch's sequences.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    max_seqlen: int
    causal: bool
    scale: float
    cu_seqlens: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    token_index: Tensor | None = None
    num_prefix: int = 0
    interleaved: bool = True

    def forward(self, op: str, lse: Tensor) -> Tensor:
        """Returns the output and fills `lse`."""
        out = torch.empty_like(self.q, memory_format=torch.contiguous_format)
        if self.k.numel() == 0:
            lse.fill_(float("-inf"))
            return out.zero_()
        if out.numel() > 0:
            self._with_rotated_keys(op)._launch("forward", op, (out,), (lse,))
        return out

    def backward(self, op: str, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns dq, and dk and dv of each head of q."""
        dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
        dq = torch.empty_like(out)
        dk, dv = (out.new_empty(*self.k.shape[:-2], *self.q.shape[-2:]) for _ in range(2))
        if dq.numel() == 0 or dk.numel() == 0:
            return dq.zero_(), dk.zero_(), dv.zero_()
        delta = torch.empty_like(lse)
        call = self._with_rotated_keys(op)
        q = self.q if self.cos is None else torch.empty_like(out)
        call._launch("dq", op, (dout, out, dq) if self.cos is None else (dout, out, dq, q), (lse, delta))
        replace(call, q=q)._launch("dkdv", op, (dout, dk, dv), (lse, delta))
        return dq, dk, dv

    def _with_rotated_keys(self, op: str) -> "Attention":
        """Rotates keys once, in a separate pass, as every query loads them."""
        if self.cos is None:
            return self
        k = torch.empty_like(self.k, memory_format=torch.contiguous_format)
        replace(self, q=self.k)._launch("rotate", op, (k,), ())
        return replace(self, k=k)

    def _launch(self, kind: str, op: str, heads: tuple[Tensor, ...], statistics: tuple[Tensor, ...]) -> None:
        """Launches the pass `kind` of `attention_kernel`."""
        head_dim, packed = self.q.shape[-1], self.cu_seqlens is not None
        chosen = config(op, {"head_dim": head_dim}, self.q)
        block, step = chosen["BLOCK_M"], chosen["BLOCK_N"]
        if kind == "dkdv":  # its programs have tiles of keys
            chosen |= {"BLOCK_M": step, "BLOCK_N": block}
        if kind == "rotate":
            block, tokens, prefix = step, self.num_prefix, 0
        else:
            tokens, prefix = self._prefix(block, step)
        queries, keys = self.q.shape[-3], self.k.shape[-3]
        length = keys if kind == "dkdv" and not packed else self.max_seqlen
        tiles = triton.cdiv(length - (tokens if prefix else 0), block) + (prefix > 0)
        vector, strides = in_vectors(
            [s for x in (self.q, self.k, self.v) for s in (0 if packed else x.stride(0), *x.stride()[-3:-1])],
            self.q.element_size(),
        )
        tables, table_rows = self._tables()
        products = float32_products(self.q)
        form = Form(
            D=head_dim,
            PAIRS=None if self.cos is None else "interleaved" if self.interleaved else "halves",
            CAUSAL=self.causal and kind != "rotate",
            PREFIX=prefix,
            VECTOR=vector,
            PRECISION=products,
            # Without tensor cores a second copy of the loop would spill registers.
            PEELED=products != "ieee" or self.q.dtype != torch.float32,
            UNSEEN=self.causal and keys < queries,
        )
        with device_guard(self.q):
            attention_kernel[(tiles * self.heads * self.samples,)](
                *((self.q, self.k, self.v), heads, statistics, tables, self.cu_seqlens, *strides, table_rows),
                *(tiles, self.heads, self.heads // self.k.shape[-2], queries, keys, tokens),
                self.scale * math.log2(math.e),
                PASS=kind,
                FORM=form,
                **chosen,
            )

    @property
    def heads(self) -> int:
        return self.q.shape[-2]

    @property
    def samples(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def _prefix(self, rows: int, step: int) -> tuple[int, int]:
        """Tokens of the prefix, and rows of a separate one; 0 rows if one with the patches is less work.

        Without a rotation any number of first tokens can be the prefix.
        """

        def apart(tokens: int) -> int:
            patches = self.max_seqlen - tokens
            return int((_padded(patches, rows) + PREFIX_ROWS.value) * (_padded(patches, step) + PREFIX_ROWS.value))

        tokens, most = self.num_prefix, min(PREFIX_ROWS.value, self.max_seqlen - 1)
        if self.cos is None and self.cu_seqlens is None and self.q.shape[-3] == self.k.shape[-3] and most > 0:
            tokens = min(range(1, most + 1), key=apart)
        together = _padded(self.max_seqlen, rows) * _padded(self.max_seqlen, step)
        if tokens == 0 or together <= apart(tokens):
            return self.num_prefix, 0
        return tokens, 1 if tokens == 1 else int(PREFIX_ROWS.value)

    def _tables(self) -> tuple[tuple[Tensor | None, ...], int]:
        """(cos, sin, token_index), and rows between the tables of heads."""
        cos, sin, token_index = map(dense, (self.cos, self.sin, self.token_index))
        return (cos, sin, token_index), 0 if cos is None or cos.dim() == 2 else cos.shape[1]


def dense_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copies heads unless their channels are dense and the offsets in a tile fit 32 bits."""
    q, k, v = (x if x.stride(-1) == 1 and x.stride(-3) < _MOST_ROW_STRIDE else _copied(x) for x in (q, k, v))
    return q, k, v


def _copied(heads: Tensor) -> Tensor:
    """Copies, as `contiguous` doesn't change the stride of a single row."""
    return torch.empty_like(heads, memory_format=torch.contiguous_format).copy_(heads)


def _padded(tokens: int, tile: int) -> int:
    return -(-tokens // tile) * tile


def rope_attention_forward(q, k, v, cos, sin, token_index, num_prefix, causal, interleaved, scale):
    batch, tokens, heads, _ = q.shape
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    call = Attention(*dense_heads(q, k, v), tokens, causal, scale, None, cos, sin, token_index, num_prefix, interleaved)
    return call.forward("rope_attention_forward", lse), lse


def rope_attention_backward(dout, q, k, v, out, lse, cos, sin, token_index, num_prefix, causal, interleaved, scale):
    call = Attention(
        *dense_heads(q, k, v), q.shape[1], causal, scale, None, cos, sin, token_index, num_prefix, interleaved
    )
    return call.backward("rope_attention_backward", dout, out, lse)


# --- calls that are timed and compiled for each entry of CONFIGS ------------------------------------------------------


def rope_attention_forward_calls(draw, head_dim, tokens):
    qkv, tables = draw_heads(draw, head_dim, tokens)
    yield *qkv, *tables, None, 1, False, True, head_dim**-0.5
    yield *qkv, None, None, None, 0, True, True, head_dim**-0.5
    patch_tables = [table[4:] for table in tables]  # after a class token and four registers
    yield *qkv, *patch_tables, None, 5, True, True, head_dim**-0.5
    q, k, v = qkv
    yield q, k[:, 1:], v[:, 1:], None, None, None, 0, True, True, head_dim**-0.5  # a query may see no key


def rope_attention_backward_calls(draw, head_dim, tokens):
    for q, k, v, *rest in rope_attention_forward_calls(draw, head_dim, tokens):
        lse = draw.statistic(q.shape[0], draw.heads, tokens)
        yield draw(*q.shape), q, k, v, draw(*q.shape), lse, *rest


def draw_heads(draw, head_dim, tokens):
    """q, k and v, views of one packed projection, and the tables of all tokens but the class token."""
    batch = max(1, draw.elements // (tokens * draw.heads * head_dim))
    tables = draw.statistic(tokens - 1, head_dim // 2), draw.statistic(tokens - 1, head_dim // 2)
    return draw(batch, tokens, 3, draw.heads, head_dim).unbind(2), tables
