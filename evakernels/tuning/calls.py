"""Calls of each op at the sizes of a configuration, for the search and the compile tests.

A kernel's file has a function `<op>_calls` for each op in CONFIGS. It takes the sizes of an entry and yields arguments:
first a model's, with all optional tensors, then others without some. Tensors are those of a large batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..triton import launcher

EPS = 1e-6
BETAS_AND_EPS = 0.9, 0.98, EPS


@dataclass(frozen=True)
class Draw:
    """Draws the tensors of a call; on the device `meta` they take no memory.

    Attributes:
        elements: size of an activation; by default larger than any GPU's L2 cache.
        pairs: batch of a contrastive loss.
    """

    device: str
    dtype: torch.dtype
    elements: int = 1 << 26
    batch: int = 64
    heads: int = 16
    pairs: int = 1 << 15

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def statistic(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self.device) + 0.5


def calls(op: str, shape: dict[str, int], draw: Draw) -> Iterator[tuple[Any, ...]]:
    """The arguments of the calls of `op` at these sizes."""
    sizes = {name: size for name, size in shape.items() if name != "itemsize"}
    result: Iterator[tuple[Any, ...]] = getattr(import_module(launcher(op).__module__), f"{op}_calls")(draw, **sizes)
    return result
