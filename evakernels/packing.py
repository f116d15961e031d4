"""Batches of sequences of different lengths, without padding."""

from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ._modes import is_transformed
from .ops.packed_attention import packed_attention
from .ops.token_dropout import token_dropout


class Packing(NamedTuple):
    """Sequences of different lengths: tokens as rows `[T, ...]`, and as cells of a padded batch `[B, N, ...]`.

    Attributes:
        batch, length: B and N of the padded batch.
        rows: int64 `[T]`, cell b * N + n of each row, ascending; None if the rows are all B * N cells.
        cu_seqlens: int32 or int64 `[S + 1]`, the first row of each sequence, and T.
        lengths: of the dtype of `cu_seqlens`, `[S]`, tokens of each sequence. If `rows` is None, its later rows are
            padding. Lengths of a mask may be 0, which `last` and `attend_once` don't support.
        max_seqlen: the longest sequence, or an upper bound.
        causal: whether tokens see no later ones.
    """

    batch: int
    length: int
    rows: Tensor | None
    cu_seqlens: Tensor
    lengths: Tensor
    max_seqlen: int
    causal: bool = False

    @classmethod
    def from_lengths(cls, lengths: Tensor, total: int, longest: int) -> Self:
        """Packed sequences.

        Args:
            lengths: int64 `[B]`.
            total: their sum.
            longest: their maximum, or an upper bound.
        """
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
        rows = torch.arange(total, device=lengths.device)
        sequence = torch.searchsorted(cu_seqlens[1:], rows, right=True)
        cells = rows - cu_seqlens[sequence] + sequence * longest
        return cls(lengths.shape[0], longest, cells, cu_seqlens, lengths, longest)

    @classmethod
    def padded(cls, lengths: Tensor, length: int, causal: bool = False) -> Self:
        """Sequences of `lengths`, int64 `[B]`, each padded to `length` rows."""
        batch = lengths.shape[0]
        cu_seqlens = length * torch.arange(batch + 1, device=lengths.device)
        return cls(batch, length, None, cu_seqlens, lengths, length, causal)

    def pack(self, x: Tensor) -> Tensor:
        """`[B, N, ...]` of any dtype -> rows `[T, ...]`.

        Raises:
            ValueError: for another B or N.
        """
        if x.shape[:2] != (self.batch, self.length):
            expected = f"[{self.batch}, {self.length}, ...]"
            raise ValueError(f"Packing.pack: x must have shape {expected}, got {list(x.shape)}")
        tokens = x.flatten(0, 1)
        if self.rows is None:
            return tokens
        if x.dim() == 2 or not x.is_floating_point():
            return tokens.index_select(0, self.rows)
        rows = token_dropout(tokens.flatten(1).unsqueeze(0), self.rows.unsqueeze(0))
        return rows.view(-1, *x.shape[2:])

    def unpack(self, x: Tensor) -> Tensor:
        """Rows `[T, ...]` -> `[B, N, ...]`, with zeros in cells without a row."""
        if self.rows is not None:
            cells = self.batch * self.length
            if not torch.compiler.is_compiling() and is_transformed():
                x = x.new_zeros(cells, *x.shape[1:]).index_copy(0, self.rows, x)
            else:
                x = _Unpack.apply(x, self.rows, cells)  # type: ignore[no-untyped-call]
        return x.view(self.batch, self.length, *x.shape[1:])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention within each sequence.

        Args:
            q, k, v: `[T, H, D]` or `[1, T, H, D]`.
            options: further arguments of `packed_attention`.

        Returns:
            As `q`.
        """
        shape, options = q.shape, {"max_seqlen": self.max_seqlen, "causal": self.causal, **options}
        q, k, v = (part.flatten(0, -3) for part in (q, k, v))
        out: Tensor = packed_attention(q, k, v, self.cu_seqlens, **options)
        return out.view(shape)

    def attend_once(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from one query per sequence to all tokens of its sequence, which must begin in column 0.

        Args:
            q: `[B, H, D]`.
            k, v: `[T, H, D]`.

        Returns:
            `[B, H, D]`.
        """
        k, v = (self.unpack(part).transpose(1, 2) for part in (k, v))
        mask = self.mask()[:, None, None]
        return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, attn_mask=mask).squeeze(2)

    def last(self, x: Tensor) -> Tensor:
        """Rows `[T, ...]` -> the last token of each sequence, `[B, ...]`."""
        return x.index_select(0, self.cu_seqlens[:-1] + self.lengths - 1)

    def mask(self) -> Tensor:
        """Bool `[B, N]`, the cells of tokens, for sequences that begin in column 0."""
        return torch.arange(self.length, device=self.lengths.device) < self.lengths.unsqueeze(1)

    def positions(self) -> Tensor:
        """Column of each packed row, int64 `[T]`."""
        return self._cells() % self.length

    def samples(self) -> Tensor:
        """Index b of each packed row, int64 `[T]`."""
        return self._cells() // self.length

    def _cells(self) -> Tensor:
        return torch.arange(self.batch * self.length, device=self.lengths.device) if self.rows is None else self.rows


class _Unpack(torch.autograd.Function):
    # Saves the rows alone; autograd's formula of index_copy saves `x` too. functorch's transforms refuse it.

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, cells: int) -> Tensor:
        ctx.save_for_backward(rows)
        return x.new_zeros(cells, *x.shape[1:]).index_copy_(0, rows, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None
