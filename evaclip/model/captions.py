"""Where the tokens of a batch of captions lie: in a padded grid, or packed without the padding."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor


class Layout(NamedTuple):
    """A batch's tokens as rows `[T, ...]`, and the way to the grid `[batch, length, ...]` and back.

    Attributes:
        batch, length: of the grid.
        last: int64 `[batch]`, position of each caption's end token.
        cu_seqlens: int64 `[batch + 1]`, the row in which each caption begins, and the number of rows.
        rows: int64 `[T]`, each row's cell of the grid; None if there is a row for each cell.
    """

    batch: int
    length: int
    last: Tensor
    cu_seqlens: Tensor
    rows: Tensor | None

    @classmethod
    def padded(cls, tokens: Tensor) -> Self:
        """All positions of token ids `[B, N]`. A caption ends at the first occurrence of its largest id."""
        batch, length = tokens.shape
        cu_seqlens = length * torch.arange(batch + 1, device=tokens.device)
        return cls(batch, length, tokens.argmax(dim=-1), cu_seqlens, None)

    @classmethod
    def packed(cls, tokens: Tensor) -> Self:
        """The positions up to each caption's end, in a grid as long as the longest. The host waits for the device."""
        last = tokens.argmax(dim=-1)
        length = int(last.max()) + 1
        used = torch.arange(length, device=tokens.device) <= last.unsqueeze(1)
        rows = used.flatten().nonzero().squeeze(1)
        return cls(len(tokens), length, last, F.pad((last + 1).cumsum(0), (1, 0)), rows)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Self:
        """The same with its tensors moved to where the tokens go."""
        rows = None if self.rows is None else move(self.rows)
        return self._replace(last=move(self.last), cu_seqlens=move(self.cu_seqlens), rows=rows)

    def positions(self) -> Tensor:
        """int64 `[T]`, the position of each row in its caption; for packed rows only."""
        assert self.rows is not None
        return self.rows % self.length

    def spread(self, x: Tensor) -> Tensor:
        """Rows `[T, C]` -> grid `[batch, length, C]`, 0 where there is no row."""
        if self.rows is not None:
            x = _Spread.apply(x, self.rows, self.batch * self.length)  # type: ignore[no-untyped-call]
        return x.view(self.batch, self.length, x.shape[-1])

    def at_ends(self, x: Tensor) -> Tensor:
        """Rows `[T, C]` -> those of the end tokens, `[batch, C]`."""
        return x.index_select(0, self.cu_seqlens[:-1] + self.last)

    def before_ends(self) -> Tensor:
        """bool `[batch, length]`, the positions up to each caption's end."""
        return torch.arange(self.length, device=self.last.device) <= self.last.unsqueeze(1)


class _Spread(torch.autograd.Function):
    # Rows are distinct, so a copy does where autograd's own formula would add.

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, cells: int) -> Tensor:
        ctx.save_for_backward(rows)
        return x.new_zeros(cells, x.shape[1]).index_copy_(0, rows, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None
