"""The contrastive losses over logits `s = logit_scale * image @ text^T`, computed in tiles of rows.

    statistics  lse_j s_ij, lse_i s_ij, s_i,offset+i            InfoNCE (Radford et al. 2021)
    siglip      sum_ij -log sigmoid(z_ij (s_ij + logit_bias))   z = 1 on the pairs, else -1 (Zhai et al. 2023)

A gradient of InfoNCE needs the log-sum-exps of all rows and columns, so backward recomputes the logits, unless
forward was to `keep` them. `siglip_forward` returns the gradients with the loss, and backward scales them.

Row i of `image` [m, D] belongs to row offset + i of `text` [B, D]. One tile of logits serves both directions, and the
[m, B] matrix never exists unless it is saved. Logits and sums are float32 (float64 for float64 input); 16-bit features
are widened first, as a CPU has no 16-bit matmul with a float32 result. Gradients that aren't needed are empty and cost
no matmul.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import accumulation_dtype

TILE_ELEMENTS = 1 << 22
"""Maximum logits of a tile (16 MiB in float32), but at least one row."""


def contrastive_forward(
    image: Tensor, text: Tensor, logit_scale: Tensor, offset: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of the logits, and the logits; `[0]` unless they are kept."""
    image, text, scale = _widened(image, text, logit_scale)
    col_max = text.new_full((text.shape[0],), -torch.inf)
    col_sum = torch.zeros_like(col_max)
    saved = image.new_empty((image.shape[0], text.shape[0]) if keep else (0,))
    row_statistics: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows in _row_tiles(image, text):
        logits = torch.mm(scale * image[rows], text.T, out=saved[rows] if keep else None)
        # A view of the diagonal would keep its tile alive.
        positive = logits.diagonal(offset + rows.start).clone()
        row_statistics.append((logits.logsumexp(1), positive, logits.detach().amax(1)))
        col_max, col_sum = _add_to_columns(col_max, col_sum, logits)
    row_lse, positive, row_max = (torch.cat(parts) for parts in zip(*row_statistics, strict=True))
    return row_lse, col_sum.log() + _finite(col_max), positive, row_max, col_max, saved


def contrastive_backward(
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
    gradients = _Gradients(image, text, logit_scale, needs_grad)
    for rows, tile in gradients.tiles(logits):
        through_rows = (tile - row_lse[rows, None]).exp_().mul_(drow_lse[rows, None])
        dlogits = (tile - col_lse).exp_().mul_(dcol_lse).add_(through_rows)
        dlogits.diagonal(offset + rows.start).add_(dpositive[rows])
        gradients.add(rows, dlogits)
    return gradients.result()


def siglip_forward(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, needs_grad: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The summed loss and its gradients; those of the scalars are undefined if no input needs a gradient."""
    gradients = _Gradients(*_widened(image, text, logit_scale), needs_grad[:2])
    total, dbias = (torch.zeros_like(gradients.dscale) for _ in range(2))
    for rows, tile in gradients.tiles():
        logits = _negate_pairs(tile + logit_bias, offset + rows.start)
        # The loss of a logit x that should be negative is softplus(x) = -log sigmoid(-x).
        total = total - F.logsigmoid(-logits).sum()
        if any(needs_grad):
            # Negating the pairs before and after the sigmoid gives them sigmoid(x) - 1 without its cancellation.
            dlogits = _negate_pairs(logits.sigmoid_(), offset + rows.start)
            dbias += dlogits.sum()
            gradients.add(rows, dlogits)
    return total, *gradients.result(), dbias


class _Gradients:
    """Computes the logits tile by tile and accumulates the gradients of features and scale."""

    def __init__(self, image: Tensor, text: Tensor, logit_scale: Tensor, needs_grad: Sequence[bool]) -> None:
        self.needs_image, self.needs_text = needs_grad
        self.dtypes = image.dtype, text.dtype, logit_scale.dtype
        self.image, self.text, self.scale = _widened(image, text, logit_scale)
        # Contiguous, as compiled code expects.
        self.dimage = self.image.new_empty(self.image.shape if self.needs_image else 0)
        self.dtext = self.text.new_zeros(self.text.shape if self.needs_text else 0)
        self.dscale = torch.zeros_like(self.scale)

    def tiles(self, saved: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        for rows in _row_tiles(self.image, self.text):
            yield rows, (self.scale * self.image[rows]) @ self.text.T if saved is None else saved[rows]

    def add(self, rows: slice, dlogits: Tensor) -> None:
        image = self.image[rows]
        if self.needs_text:
            dscaled_text = dlogits.T @ image
            self.dtext += self.scale * dscaled_text
        if self.needs_image or not self.needs_text:
            dscaled_image = dlogits @ self.text
            self.dscale += (image * dscaled_image).sum()
        else:  # the scale's gradient from whichever product there is
            self.dscale += (self.text * dscaled_text).sum()
        if self.needs_image:
            self.dimage[rows] = self.scale * dscaled_image

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        image, text, scale = self.dtypes
        return self.dimage.to(image), self.dtext.to(text), self.dscale.to(scale)


def _widened(image: Tensor, text: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(image)
    return image.to(dtype), text.to(dtype), logit_scale.to(dtype)


def _row_tiles(image: Tensor, text: Tensor) -> Iterator[slice]:
    """Tiles of rows by shape only, so that the order of sums doesn't depend on the number of threads."""
    rows, height = image.shape[0], max(1, TILE_ELEMENTS // text.shape[0])
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def _add_to_columns(col_max: Tensor, col_sum: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Adds a tile to the running log-sum-exp of the columns, `log(col_sum) + col_max`."""
    new_max = torch.maximum(col_max, logits.detach().amax(0))
    shift = _finite(new_max)
    return new_max, col_sum * (col_max - shift).exp() + (logits - shift).exp_().sum(0)


def _finite(maximum: Tensor) -> Tensor:
    """The maximum, or 0 instead of an infinite one: infinity minus infinity is NaN."""
    return maximum.where(maximum.isfinite(), 0)


def _negate_pairs(logits: Tensor, offset: int) -> Tensor:
    logits.diagonal(offset).neg_()
    return logits
