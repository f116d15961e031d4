"""Calls of each op at the sizes of a configuration: what the search times, and what the tests compile.

A function here is named like its op, takes the sizes that the op's configurations are looked up by, and yields the
arguments of calls. The first is the one that models make, with all that may be present; the others differ in what is
absent. Tensors are those of a large batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ELEMENTS = 1 << 26
"""Of an activation: more than any GPU's L2 cache holds."""

EPS = 1e-6


@dataclass(frozen=True)
class Draw:
    """Draws the tensors of a call; on the device `meta` they take no memory."""

    device: str
    dtype: torch.dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def statistic(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self.device) + 0.5


def calls(op: str, shape: dict[str, int], draw: Draw) -> Iterator[tuple[Any, ...]]:
    """The arguments of the calls of `op` at these sizes."""
    sizes = {name: size for name, size in shape.items() if name != "itemsize"}
    function: Callable[..., Iterator[tuple[Any, ...]]] = globals()[op]
    return function(draw, **sizes)


def swiglu_forward(draw: Draw, width: int) -> Iterator[tuple[Any, ...]]:
    gate, up, weight, bias = _swiglu(draw, width)
    yield gate, up, weight, bias, EPS
    yield gate, up, weight, None, EPS
    yield gate, up, None, None, EPS


def swiglu_backward(draw: Draw, width: int) -> Iterator[tuple[Any, ...]]:
    gate, up, weight, _ = _swiglu(draw, width)
    dout, mean, rstd = draw(*gate.shape), draw.statistic(len(gate)), draw.statistic(len(gate))
    yield dout, gate, up, weight, mean, rstd, True
    yield dout, gate, up, None, mean[:0], rstd[:0], False


def _swiglu(draw: Draw, width: int) -> tuple[Tensor, ...]:
    """Halves of a packed projection, whose rows begin at any even address, as at the 2730 channels of EVA02-L."""
    width = 2 * width // 3
    gate, up = draw(ELEMENTS // width, 2 * width).chunk(2, -1)
    return gate, up, draw(width), draw(width)
