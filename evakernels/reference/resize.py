"""Resize of 8-bit images with the bits of `PIL.Image.resize`.

Each of two passes, across and down, rounds its results to 8 bits:

    out[x] = clip((sum_i weight[x, i] * level[i] + 2**21) >> 22, 0, 255)

Weights are computed in float64, divided by their sum and rounded to 22 bits. Colours are multiplied by alpha before
the passes and divided by it afterwards.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Weights = np.ndarray[tuple[int, int], np.dtype[np.float64]]

_BITS = 22


def _sinc(x: float) -> float:
    return math.sin(x * math.pi) / (x * math.pi) if x else 1.0


def _bicubic(x: float) -> float:
    x, a = abs(x), -0.5
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


FILTERS: dict[str, tuple[Callable[[float], float], float]] = {
    "box": (lambda x: float(-0.5 < x <= 0.5), 0.5),
    "bilinear": (lambda x: max(0.0, 1.0 - abs(x)), 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (lambda x: _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0, 3.0),
}
"""By name: the weight at a distance, and the largest distance with a weight; in the order of the kernels' numbers."""


def resize(
    image: Tensor,
    size: Sequence[int],
    box: Sequence[float],
    crop: Sequence[int],
    filter: int,
    down_first: bool,
    is_mirrored: bool,
    table: Tensor | None,
) -> Tensor:
    height, width, channels = image.shape
    has_alpha = channels % 2 == 0 and (*size, *box) != (height, width, 0, 0, width, height)
    top, left, rows, columns = crop
    levels = image.to(torch.int64)
    if has_alpha:
        product = levels[..., :-1] * levels[..., -1:] + 128
        levels = torch.cat([((product >> 8) + product) >> 8, levels[..., -1:]], -1)
    across = _weights(filter, width, box[0], box[2], size[1])[left : left + columns]
    down = _weights(filter, height, box[1], box[3], size[0])[top : top + rows]
    for dim in (0, 1) if down_first else (1, 0):
        levels = _weighted(levels.transpose(0, dim), across if dim else down).transpose(0, dim)
    if has_alpha:
        alpha = levels[..., -1:]
        divided = (255 * levels[..., :-1] // alpha.clamp(min=1)).clamp(max=255)
        levels = torch.cat([torch.where(alpha == 0, levels[..., :-1], divided), alpha], -1)
    if is_mirrored:
        levels = levels.flip(1)
    values = levels.to(torch.uint8) if table is None else table[torch.arange(channels, device=table.device), levels]
    return values.permute(2, 0, 1).contiguous()


def _weights(filter: int, inputs: int, low: float, high: float, outputs: int) -> Weights:
    """`[outputs, inputs]`, in units of 2**-22."""
    weight_at, support = list(FILTERS.values())[filter]
    begin, end = np.float32(low), np.float32(high)
    scale = float(end - begin) / outputs
    stretch = max(scale, 1.0)
    weights = np.zeros((outputs, inputs))
    for x, row in enumerate(weights):
        center = float(begin) + (x + 0.5) * scale
        first = max(0, int(center - support * stretch + 0.5))
        last = min(inputs, int(center + support * stretch + 0.5))
        values = [weight_at((i - center + 0.5) * (1.0 / stretch)) for i in range(first, last)]
        total = sum(values) or 1.0
        row[first:last] = [math.trunc(value / total * 2**_BITS + math.copysign(0.5, value)) for value in values]
    return weights


def _weighted(levels: Tensor, weights: Weights) -> Tensor:
    """Sums of `levels [inputs, ...]`: float64 is exact."""
    sums = torch.tensordot(torch.from_numpy(weights).to(levels.device), levels.double(), 1)
    out: Tensor = sums.add(2 ** (_BITS - 1)).div(2**_BITS).floor().clamp(0, 255).long()
    return out
