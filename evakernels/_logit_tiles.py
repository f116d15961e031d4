"""Contrastive losses on CPUs: torch multiplies a tile of rows, and a compiled pass replaces the products.

A pass scales the products to logits and replaces them by the logits or by the products' gradients. Each function takes
the pass and its reference's arguments. 16-bit features are widened, as torch has no matmul of them with a float32
result on a CPU.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._logit_gradients import feature_gradients, row_chunks, select_rows

TILE = 1 << 26, 512
"""Maximum elements of a tile (256 MiB), but at least one row, and maximum rows: enough for matmuls at full rate."""

Pass = Callable[..., Any]


def contrastive_forward(
    statistics: Pass, image: Tensor, text: Tensor, logit_scale: Tensor, offset: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    image, text = image.float(), text.float()
    rows, columns = image.shape[0], text.shape[0]
    logits = image.new_empty((rows, columns) if keep else 0)
    # Until the last tile col_lse has sums of exp(logit - col_max).
    col_lse, col_max = text.new_zeros(columns), text.new_full((columns,), -math.inf)
    tile_statistics: list[tuple[Tensor, Tensor, Tensor]] = []
    for chunk in row_chunks(rows, _height(text)):
        tile = torch.mm(select_rows(image, chunk), text.T, out=select_rows(logits, chunk) if keep else None)
        tile_statistics.append(
            statistics(tile, logit_scale, offset + chunk.start, col_lse, col_max, chunk.stop == rows)
        )
        del tile  # before the next one is made
    row_lse, positive, row_max = (
        tile_statistics[0] if len(tile_statistics) == 1 else map(torch.cat, zip(*tile_statistics, strict=True))
    )
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
    upstream = drow_lse.contiguous(), dcol_lse.contiguous(), dpositive.contiguous()
    saved = None if logits is None or logit_scale.item() == 0 else logits  # a scale of 0 hides the products
    dscales = []

    def chunk_gradients(rows: slice, image: Tensor, text: Tensor) -> Tensor:
        tile = torch.mm(image, text.T) if saved is None else select_rows(saved, rows).clone()
        vectors = *upstream, row_lse, col_lse
        dscales.append(gradients(tile, saved is not None, logit_scale, rows.start, offset, *vectors))
        return tile

    features = image.float(), text.float()
    dimage, dtext, _ = feature_gradients(chunk_gradients, *features, None, needs_grad, torch.float32, _height(text))
    return dimage.to(image.dtype), dtext.to(text.dtype), _total(dscales).to(logit_scale.dtype)


def siglip_forward(
    siglip: Pass,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums: list[tuple[Tensor, Tensor, Tensor]] = []

    def chunk_gradients(rows: slice, image: Tensor, text: Tensor) -> Tensor:
        tile = torch.mm(image, text.T)
        sums.append(siglip(tile, logit_scale, logit_bias, offset + rows.start, any(needs_grad)))
        return tile

    features = image.float(), text.float()
    dimage, dtext, _ = feature_gradients(chunk_gradients, *features, None, needs_grad[:2], torch.float32, _height(text))
    loss, dscale, dbias = map(_total, zip(*sums, strict=True))
    return loss, dimage, dtext, dscale, dbias


def _total(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(tuple(parts)).sum(dtype=torch.float64).float()


def _height(text: Tensor) -> int:
    most_elements, most_rows = TILE
    return max(1, min(most_rows, most_elements // text.shape[0]))
