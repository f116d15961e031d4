"""Where the tokens of a batch of captions lie: in a padded grid, or packed without the padding."""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


class Layout(NamedTuple):
    """A batch's tokens as rows `[T, ...]`, and the way to the grid `[batch, length, ...]` and back.

    Attributes:
        batch, length: of the grid.
        last: int64 `[batch]`, position of each caption's end token.
        ends: int64 `[batch]`, the row of each caption's end token.
        rows: int64 `[T]`, each row's cell of the grid; None if there is a row for each cell.
    """

    batch: int
    length: int
    last: Tensor
    ends: Tensor
    rows: Tensor | None

    @classmethod
    def padded(cls, tokens: Tensor) -> Self:
        """All positions of token ids `[B, N]`. A caption ends at the first occurrence of its largest id."""
        batch, length = tokens.shape
        last = tokens.argmax(dim=-1)
        return cls(batch, length, last, last + length * torch.arange(batch, device=tokens.device), None)

    @classmethod
    def packed(cls, tokens: Tensor) -> Self:
        """The positions up to each caption's end, in a grid as long as the longest. The host waits for the device."""
        last = tokens.argmax(dim=-1)
        length = int(last.max()) + 1
        used = torch.arange(length, device=tokens.device) <= last.unsqueeze(1)
        rows = used.flatten().nonzero().squeeze(1)
        return cls(len(tokens), length, last, (last + 1).cumsum(0) - 1, rows)

    def positions(self) -> Tensor:
        """int64 `[T]`, the position of each row in its caption; for packed rows only."""
        assert self.rows is not None
        return self.rows % self.length

    def spread(self, x: Tensor) -> Tensor:
        """Rows `[T, C]` -> grid `[batch, length, C]`, 0 where there is no row."""
        if self.rows is not None:
            x = _Spread.apply(x, self.rows, self.batch * self.length)  # type: ignore[no-untyped-call]
        return x.view(self.batch, self.length, x.shape[-1])

    def gather(self, x: Tensor) -> Tensor:
        """Grid `[batch, length, C]` -> rows `[T, C]`."""
        x = x.flatten(0, 1)
        if self.rows is None:
            return x
        gathered: Tensor = _Gather.apply(x, self.rows)  # type: ignore[no-untyped-call]
        return gathered

    def at_ends(self, x: Tensor) -> Tensor:
        """Rows `[T, C]` -> those of the end tokens, `[batch, C]`."""
        return x.index_select(0, self.ends)

    def before_ends(self) -> Tensor:
        """bool `[batch, length]`, the positions up to each caption's end."""
        return torch.arange(self.length, device=self.last.device) <= self.last.unsqueeze(1)


class _Spread(torch.autograd.Function):
    # Each the other's gradient: rows are distinct, so a copy does, where autograd's own formula would add.

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, cells: int) -> Tensor:
        ctx.save_for_backward(rows)
        return x.new_zeros(cells, x.shape[1]).index_copy_(0, rows, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.cells = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.new_zeros(ctx.cells, grad.shape[1]).index_copy_(0, ctx.saved_tensors[0], grad), None
