"""Rows of a batch of sequences of different lengths."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor


class Layout(NamedTuple):
    """Tokens of a batch as rows `[T, ...]`, packed or padded, and their cells in a grid `[batch, length, ...]`.

    A sequence is a caption, or an image with its class token after its patches.

    Attributes:
        batch, length: shape of the grid.
        last: int64 `[batch]`, position of each sequence's pooled token: a caption's end token, an image's class token.
        cu_seqlens: int64 `[batch + 1]`, the first row of each sequence, and the number of rows.
        rows: int64 `[T]`, each row's cell of the grid; None for a row per cell.
    """

    batch: int
    length: int
    last: Tensor
    cu_seqlens: Tensor
    rows: Tensor | None

    @classmethod
    def padded(cls, tokens: Tensor) -> Self:
        """All positions of token ids `[B, N]`; a caption ends at the first occurrence of its largest id."""
        batch, length = tokens.shape
        cu_seqlens = length * torch.arange(batch + 1, device=tokens.device)
        return cls(batch, length, tokens.argmax(dim=-1), cu_seqlens, None)

    @classmethod
    def packed(cls, tokens: Tensor) -> Self:
        """Positions up to each caption's end, in a grid as long as the longest; synchronizes with the device.

        In a graph of `torch.compile` the grid is as long as `tokens`, and only the number of rows depends on the data.
        """
        last = tokens.argmax(dim=-1)
        compiling = torch.compiler.is_compiling()
        length = tokens.shape[1] if compiling else int(last.max()) + 1
        used = torch.arange(length, device=tokens.device) <= last.unsqueeze(1)
        rows = used.flatten().nonzero().squeeze(1)
        if compiling:
            torch._check(rows.shape[0] >= tokens.shape[0])
            torch._check(rows.shape[0] <= tokens.numel())
        return cls(tokens.shape[0], length, last, F.pad((last + 1).cumsum(0), (1, 0)), rows)

    @classmethod
    def of_lengths(cls, lengths: Tensor, total: int, longest: int) -> Self:
        """Packed sequences of `lengths`, int64 `[batch]`, with `total` rows; each pools its last token."""
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
        rows = torch.arange(total, device=lengths.device)
        sequence = torch.searchsorted(cu_seqlens[1:], rows, right=True)
        cells = rows - cu_seqlens[sequence] + sequence * longest
        return cls(lengths.shape[0], longest, lengths - 1, cu_seqlens, cells)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Self:
        """A layout with all tensors moved."""
        rows = None if self.rows is None else move(self.rows)
        return self._replace(last=move(self.last), cu_seqlens=move(self.cu_seqlens), rows=rows)

    def positions(self) -> Tensor:
        """Position of each packed row in its sequence, int64 `[T]`."""
        assert self.rows is not None
        return self.rows % self.length

    def sequences(self) -> Tensor:
        """Index of each packed row's sequence, int64 `[T]`."""
        assert self.rows is not None
        return self.rows // self.length

    def spread(self, x: Tensor) -> Tensor:
        """Rows `[T, C]` -> grid `[batch, length, C]`, 0 in cells without a row."""
        if self.rows is not None:
            x = _Spread.apply(x, self.rows, self.batch * self.length)  # type: ignore[no-untyped-call]
        return x.view(self.batch, self.length, x.shape[-1])

    def mean_before_ends(self, x: Tensor) -> Tensor:
        """Rows `[T, C]` -> mean of the rows before each pooled token, `[batch, C]`."""
        counted = (torch.arange(self.length, device=x.device) < self.last.unsqueeze(1)).unsqueeze(2)
        return (self.spread(x) * counted).sum(1) / self.last.unsqueeze(1).to(x.dtype)

    def at_ends(self, x: Tensor) -> Tensor:
        """Rows `[T, ...]` -> rows of the pooled tokens, `[batch, ...]`."""
        return x.index_select(0, self.cu_seqlens[:-1] + self.last)

    def before_ends(self) -> Tensor:
        """Mask of the positions up to each pooled token, bool `[batch, length]`."""
        return torch.arange(self.length, device=self.last.device) <= self.last.unsqueeze(1)


class _Spread(torch.autograd.Function):
    # Rows are distinct, so a copy suffices where autograd's formula would add.

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, cells: int) -> Tensor:
        ctx.save_for_backward(rows)
        return x.new_zeros(cells, x.shape[1]).index_copy_(0, rows, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None
