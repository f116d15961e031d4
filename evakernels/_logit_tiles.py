"""Contrastive losses on CPUs: torch computes a tile of rows of logits, and a compiled pass runs over it.

Each function takes the pass and its reference's arguments. 16-bit features are widened, as torch has no matmul of them
with a float32 result on a CPU. Logits that forward saves are the tiles.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._logit_gradients import feature_gradients, row_chunks, siglip_totals

TILE = 1 << 26, 512
"""Maximum logits of a tile (256 MiB), but at least one row, and maximum rows: enough for matmuls at full rate."""

Pass = Callable[..., Any]


def contrastive_forward(
    statistics: Pass, image: Tensor, text: Tensor, logit_scale: Tensor, offset: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    image, text = image.float(), text.float()
    rows, columns = image.shape[0], text.shape[0]
    logits = image.new_empty((rows, columns) if keep else (0,))
    row_lse, positive, row_max = (image.new_empty(rows) for _ in range(3))
    # Until the last tile col_lse has sums of exp(logit - col_max).
    col_lse, col_max = text.new_zeros(columns), text.new_full((columns,), -math.inf)
    for chunk in row_chunks(rows, _height(text)):
        tile = _logits(image[chunk], text, logit_scale, logits[chunk] if keep else None)
        of_rows = row_lse, positive, row_max
        statistics(tile, chunk.start, offset, *of_rows, col_lse, col_max, chunk.stop == rows)
    return row_lse, col_lse, positive, row_max, col_max, logits


def contrastive_backward(
    gradients: Pass,
    drow_lse: Tensor,
    dcol_lse: Tensor,
    dpositive: Tensor,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    logits: Tensor | None,
    offset: int,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    vectors = [x.contiguous() for x in (drow_lse, dcol_lse, dpositive, row_lse, col_lse)]

    def dlogits(rows: slice, image: Tensor, text: Tensor) -> Tensor:
        tile = _logits(image, text, logit_scale) if logits is None else logits[rows].clone()
        gradients(tile, rows.start, offset, *vectors)
        return tile

    features = image.float(), text.float(), logit_scale
    dimage, dtext, dscale = feature_gradients(dlogits, *features, needs_grad, image.dtype, _height(text))
    return dimage, dtext, dscale.to(logit_scale.dtype)


def siglip_value(
    siglip: Pass, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int
) -> Tensor:
    image, text = image.float(), text.float()
    sums = []
    for rows in row_chunks(image.shape[0], _height(text)):
        tile = _logits(image[rows], text, logit_scale)
        sums.append(siglip(tile, offset + rows.start, logit_bias, False))
    return siglip_totals(sums)[0]


def siglip_forward(
    siglip: Pass,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = []

    def dlogits(rows: slice, image: Tensor, text: Tensor) -> Tensor:
        tile = _logits(image, text, logit_scale)
        sums.append(siglip(tile, offset + rows.start, logit_bias, True))
        return tile

    features = image.float(), text.float(), logit_scale
    dimage, dtext, dscale = feature_gradients(dlogits, *features, needs_grad, torch.float32, _height(text))
    loss, dbias = siglip_totals(sums)
    return loss, dimage, dtext, dscale.float(), dbias


def _height(text: Tensor) -> int:
    most_logits, most_rows = TILE
    return max(1, min(most_rows, most_logits // text.shape[0]))


def _logits(image: Tensor, text: Tensor, logit_scale: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mm(image * logit_scale, text.T, out=out)
