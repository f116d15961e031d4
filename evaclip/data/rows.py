"""Rows of several tensors as if they were one."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Rows:
    """Tensors `[n_i, ...]` one after the other, as a tensor `[sum of n_i, ...]` that nobody has put together yet.

    What is pinned stays pinned so: the parts meet on the device.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, rows: slice) -> "Rows":
        """Some of the rows, which must follow one another."""
        start, stop, _ = rows.indices(len(self))
        chosen = []
        for part in self.parts:
            if start < len(part) and stop > 0:
                chosen.append(part[max(start, 0) : stop])
            start, stop = start - len(part), stop - len(part)
        return Rows(chosen)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tensor:
        """All rows in one tensor on that device."""
        first, *others = self.parts
        if not others:
            return first.to(device, non_blocking=non_blocking)
        whole = first.new_empty((len(self), *first.shape[1:]), device=device)
        for part, rows in zip(self.parts, whole.split([len(part) for part in self.parts]), strict=True):
            rows.copy_(part, non_blocking=non_blocking)
        return whole
