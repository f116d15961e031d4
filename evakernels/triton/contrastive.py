"""The contrastive losses over tiles of logits in registers, or in backward in bounded chunks of rows.

Forward is one matmul. A program writes (largest logit, sum of exp relative to it) of each row and column of its tile; a
second kernel merges the pairs of all tiles in a fixed order. One exponential serves both directions: rows are summed
relative to their own largest logit, and their terms in column sums are rescaled to the tile's largest. A tile takes a
second exponential, relative to the columns' own maxima, if terms could vanish otherwise. So logits may be of any size.

The gradient of a logit needs the log-sum-exps of both directions, so backward recomputes the logits: one kernel writes
the gradients of a chunk of logits, and cuBLAS multiplies them with the features, four matmuls in all. If memory allows,
forward saves the logits, in float32, and three matmuls do: at a scale of 100 a 16-bit logit would be wrong by a tenth.
SigLIP has no log-sum-exps: one pass computes its loss and the gradients of its logits, with three matmuls.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _logit_gradients
from .._logit_gradients import SIGLIP_UNIT, padded, row_chunks, rows_of_chunk
from ..tuning import Entry, config, entry
from ._launch import device_guard, float32_products

SPREAD = tl.constexpr(60.0)
"""Largest distance of maxima for one exponential. exp is 0 below -87, so lost terms are below e^-27 of the largest."""

UNIT = tl.constexpr(SIGLIP_UNIT)

SIZES = ("rows", "steps", "offset")
"""Arguments that Triton doesn't specialise on. The divisors of `columns` decide the vector width of a row of logits."""

BAND = tl.constexpr(8)
"""Rows of tiles that run together, so that shared features stay in the L2 cache."""

_SQUARE = entry(depth=768, itemsize=2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)
_NARROW = entry(depth=768, itemsize=2, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=3)
_FLOAT32 = entry(depth=768, itemsize=4, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=8, num_stages=3)
_LOSS_ALONE = [
    entry(depth=768, itemsize=2, matmuls=1, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    entry(depth=768, itemsize=4, matmuls=1, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=3),
]
_SAVED = [
    entry(depth=768, itemsize=size, matmuls=2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=1)
    for size in (2, 4)
]


def _info_nce(half: Entry) -> dict[str, list[Entry]]:
    return {"contrastive_forward": [half, _FLOAT32], "contrastive_backward": [half, _FLOAT32, *_SAVED]}


CONFIGS = {
    80: _info_nce(_SQUARE) | {"siglip_forward": [_NARROW, _FLOAT32, *_LOSS_ALONE]},
    100: _info_nce(_NARROW),
    120: _info_nce(_SQUARE),
}
"""Launch configurations by compute capability; a GPU has those of the highest up to its own."""


@triton.jit
def _place(row_tiles, column_tiles):
    """The tile of this program; consecutive programs of a band have different rows."""
    program = tl.program_id(0)
    first = program // (BAND * column_tiles) * BAND
    height = tl.minimum(row_tiles - first, BAND)
    inside = program % (BAND * column_tiles)
    return first + inside % height, inside // height


@triton.jit
def _positions(first, count, BLOCK: tl.constexpr):
    """Positions from `first` on, unclamped and clamped to `count`."""
    positions = first + tl.arange(0, BLOCK)
    return positions, tl.minimum(positions, count - 1)


@triton.jit
def _products(image, text, rows, columns, steps, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    inner = tl.arange(0, BLOCK_K)
    image += rows[:, None].to(tl.int64) * (steps * BLOCK_K) + inner[None, :]
    text += columns[None, :].to(tl.int64) * (steps * BLOCK_K) + inner[:, None]
    products = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for _ in range(steps):
        products = tl.dot(tl.load(image), tl.load(text), products, input_precision=PRECISION)
        image += BLOCK_K
        text += BLOCK_K
    return products


@triton.jit
def _has_pairs(row_tile, column_tile, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    pair, column = row_tile * BLOCK_M + offset, column_tile * BLOCK_N
    return (pair < column + BLOCK_N) & (column < pair + BLOCK_M)


@triton.jit
def _finite(maximum):
    """The maximum, or 0 instead of an infinite one: infinity minus infinity is NaN."""
    return tl.where((maximum < float("inf")) & (maximum > float("-inf")), maximum, 0.0)


# --- InfoNCE --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*SIZES, "positive", "row_max", "row_sum", "col_max", "col_sum"])
def statistics_kernel(
    image,
    text,
    scale,
    positive,
    row_max,
    row_sum,
    col_max,
    col_sum,
    saved,
    rows: tl.int32,
    columns: tl.int32,
    steps: tl.int32,
    offset: tl.int32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tile, column_tile = _place(tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N))
    row, image_row = _positions(row_tile * BLOCK_M, rows, BLOCK_M)
    column, text_row = _positions(column_tile * BLOCK_N, columns, BLOCK_N)
    logits = _products(image, text, image_row, text_row, steps, BLOCK_K, PRECISION)
    logits *= tl.load(scale).to(tl.float32)
    if _has_pairs(row_tile, column_tile, offset, BLOCK_M, BLOCK_N):
        pair_logit = tl.sum(tl.where(column[None, :] == (row + offset)[:, None], logits, 0.0), 1)
        first = column_tile * BLOCK_N
        inside = (row < rows) & (row + offset >= first) & (row + offset < first + BLOCK_N)
        tl.store(positive + row, pair_logit, mask=inside)
    tile = (row < rows)[:, None] & (column < columns)[None, :]
    if saved is not None:
        tl.store(saved + row[:, None].to(tl.int64) * columns + column[None, :], logits, mask=tile)
    logits = tl.where(tile, logits, float("-inf"))
    m_i, m_j = tl.max(logits, 1), tl.max(logits, 0)
    m = tl.max(m_i)
    if m - tl.min(tl.where(column < columns, m_j, float("inf"))) <= SPREAD:
        p = tl.exp(logits - _finite(m_i)[:, None])
        l_i = tl.sum(p, 1)
        l_j = tl.sum(p * tl.exp(m_i - m)[:, None], 0) * tl.exp(m - m_j)
    else:
        l_i = tl.sum(tl.exp(logits - _finite(m_i)[:, None]), 1)
        l_j = tl.sum(tl.exp(logits - _finite(m_j)[None, :]), 0)
    at = rows.to(tl.int64) * column_tile + row
    tl.store(row_max + at, m_i, mask=row < rows)
    tl.store(row_sum + at, l_i, mask=row < rows)
    at = columns.to(tl.int64) * row_tile + column
    tl.store(col_max + at, m_j, mask=column < columns)
    tl.store(col_sum + at, l_j, mask=column < columns)


@triton.jit(do_not_specialize=["m_parts", "l_parts", "m_out", "l_out", "parts", "count"])
def merge_kernel(
    m_parts,
    l_parts,
    m_out,
    l_out,
    parts: tl.int32,
    count: tl.int32,
    FINAL: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merges sums of exp, each relative to its maximum, PARTS at a time; FINAL ones become log-sum-exps."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_i = tl.full([BLOCK], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK], tl.float32)
    for first in range(0, parts, PARTS):
        part = (first + tl.arange(0, PARTS))[:, None]
        place, inside = part * count.to(tl.int64) + at[None, :], (part < parts) & (at < count)[None, :]
        m_part = tl.load(m_parts + place, mask=inside, other=float("-inf"))
        m_new = tl.maximum(m_i, tl.max(m_part, 0))
        shift = _finite(m_new)
        p = tl.load(l_parts + place, mask=inside, other=0.0) * tl.exp(m_part - shift[None, :])
        l_i = l_i * tl.exp(m_i - shift) + tl.sum(p, 0)
        m_i = m_new
    if FINAL:
        # The maxima pass over NaN; the sums show it.
        m_i, l_i = tl.where(l_i == l_i, m_i, l_i), tl.log(l_i) + _finite(m_i)
    tl.store(m_out + at, m_i, mask=at < count)
    tl.store(l_out + at, l_i, mask=at < count)


@triton.jit(do_not_specialize=[*SIZES, "drow_lse", "dcol_lse", "dpositive", "row_lse", "col_lse"])
def gradient_kernel(
    drow_lse,
    dcol_lse,
    dpositive,
    image,
    text,
    scale,
    row_lse,
    col_lse,
    saved,
    dlogits,
    rows: tl.int32,
    columns: tl.int32,
    steps: tl.int32,
    offset: tl.int32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tile, column_tile = _place(tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N))
    row, image_row = _positions(row_tile * BLOCK_M, rows, BLOCK_M)
    column, text_row = _positions(column_tile * BLOCK_N, columns, BLOCK_N)
    if saved is None:
        logits = _products(image, text, image_row, text_row, steps, BLOCK_K, PRECISION)
        logits *= tl.load(scale).to(tl.float32)
    else:
        logits = tl.load(saved + image_row[:, None].to(tl.int64) * columns + text_row[None, :])
    lse_i, lse_j = tl.load(row_lse + image_row), tl.load(col_lse + text_row)
    drow, dcol = tl.load(drow_lse + image_row), tl.load(dcol_lse + text_row)
    shift = tl.maximum(tl.max(lse_i, 0), tl.max(lse_j, 0))
    spread = shift - tl.minimum(tl.min(lse_i, 0), tl.min(lse_j, 0))
    if _has_pairs(row_tile, column_tile, offset, BLOCK_M, BLOCK_N) | (spread > SPREAD):
        # The gradient of a pair with probability near 1 is a small difference, so it needs exact exponentials.
        gradient = drow[:, None] * tl.exp(logits - lse_i[:, None])
        gradient += dcol[None, :] * tl.exp(logits - lse_j[None, :])
        is_pair = column[None, :] == (row + offset)[:, None]
        gradient += tl.where(is_pair, tl.load(dpositive + image_row)[:, None], 0.0)
    else:
        weights = (drow * tl.exp(shift - lse_i))[:, None] + (dcol * tl.exp(shift - lse_j))[None, :]
        gradient = tl.exp(logits - shift) * weights
    at = dlogits + row[:, None].to(tl.int64) * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(at, gradient.to(dlogits.dtype.element_ty), mask=inside)


def contrastive_forward(image, text, logit_scale, offset, keep):
    rows, columns = image.shape[0], text.shape[0]
    launch = _launch("contrastive_forward", image)
    image, text = (padded(features, launch["BLOCK_K"]) for features in (image, text))
    row_tile, column_tile = launch["BLOCK_M"], launch["BLOCK_N"]
    logits = image.new_empty((rows, columns) if keep else (0,), dtype=torch.float32)
    positive, row_max, row_lse = (image.new_empty(rows, dtype=torch.float32) for _ in range(3))
    col_max, col_lse = (image.new_empty(columns, dtype=torch.float32) for _ in range(2))
    chunks = list(row_chunks(rows, rows_of_chunk(8 * columns // min(row_tile, column_tile) + 8)))
    column_parts = image.new_empty(2, len(chunks), columns, dtype=torch.float32)
    with device_guard(image):
        for chunk, sums in zip(chunks, column_parts.unbind(1), strict=True):
            count = chunk.stop - chunk.start
            by_row = image.new_empty(2, triton.cdiv(columns, column_tile), count, dtype=torch.float32)
            by_column = image.new_empty(2, triton.cdiv(count, row_tile), columns, dtype=torch.float32)
            statistics_kernel[_grid(count, columns, launch)](
                *(image[chunk], text, logit_scale, positive[chunk], *by_row, *by_column),
                *(logits[chunk] if keep else None, count, len(text), _steps(text, launch), offset + chunk.start),
                **launch,
            )
            _merge(by_row, row_max[chunk], row_lse[chunk], final=True)
            _merge(by_column, *sums, final=False)
        _merge(column_parts, col_max, col_lse, final=True)
    return row_lse, col_lse, positive, row_max, col_max, logits


def contrastive_backward(
    drow_lse, dcol_lse, dpositive, image, text, logit_scale, row_lse, col_lse, logits, offset, needs_grad
):
    inputs = drow_lse, dcol_lse, dpositive, image, text, logit_scale, row_lse, col_lse
    launch = _launch("contrastive_backward", image, matmuls=3 if logits is None else 2)
    options = offset, needs_grad, launch["BLOCK_K"]
    saved = None if logits is None else logits.contiguous()
    return _logit_gradients.contrastive_backward(partial(_dlogits, launch), *inputs, saved, *options)


def _dlogits(launch, drow_lse, dcol_lse, dpositive, image, text, logit_scale, row_lse, col_lse, offset, logits=None):
    dlogits = image.new_empty(len(image), len(text))
    with device_guard(image):
        gradient_kernel[_grid(len(image), len(text), launch)](
            *(drow_lse, dcol_lse, dpositive, image, text, logit_scale, row_lse, col_lse, logits, dlogits),
            *(*dlogits.shape, _steps(text, launch), offset),
            **launch,
        )
    return dlogits


def _merge(parts: Tensor, maximum: Tensor, result: Tensor, *, final: bool) -> None:
    """Merges `parts`, `[2, parts, n]` maxima and sums; `result` gets log-sum-exps if final, otherwise sums."""
    launch = {"PARTS": 16, "BLOCK": 64, "num_warps": 4, "enable_fp_fusion": True}  # Triton 3.10 changes the default
    grid = (triton.cdiv(result.numel(), 64),)
    merge_kernel[grid](*parts, maximum, result, *parts.shape[1:], FINAL=final, **launch)


# --- SigLIP ---------------------------------------------------------------------------------------------------------


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], as 2 artanh(x / (2 + x)): log itself would lose the digits of a small x."""
    z = x / (2.0 + x)
    square = z * z
    series = square * (1.0 / 15.0) + 1.0 / 13.0
    for i in tl.static_range(6):
        series = series * square + 1.0 / (11.0 - 2.0 * i)
    return 2.0 * z * series


@triton.jit(do_not_specialize=[*SIZES, "losses", "dbias"])
def siglip_kernel(
    image,
    text,
    scale,
    bias,
    losses,
    dbias,
    dlogits,
    rows: tl.int32,
    columns: tl.int32,
    steps: tl.int32,
    offset: tl.int32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tile, column_tile = _place(tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N))
    row, image_row = _positions(row_tile * BLOCK_M, rows, BLOCK_M)
    column, text_row = _positions(column_tile * BLOCK_N, columns, BLOCK_N)
    products = _products(image, text, image_row, text_row, steps, BLOCK_K, PRECISION)
    logits = products * tl.load(scale).to(tl.float32) + tl.load(bias).to(tl.float32)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    is_pair = column[None, :] == (row + offset)[:, None]
    # With negated pairs every loss is log(1 + e^x). Negating the pairs' gradients, too, avoids the cancellation in
    # sigmoid(x) - 1.
    x = tl.where(is_pair, -logits, logits)
    power = tl.exp(-tl.abs(x))
    loss = tl.where(x > 0.0, x, 0.0) + _log1p(power)
    tl.store(losses + tl.program_id(0), tl.sum(tl.where(inside, loss, 0.0)))
    if dlogits is not None:
        gradient = tl.where(x < 0.0, power, 1.0) / (1.0 + power)
        gradient = tl.where(is_pair, -gradient, gradient)
        tl.store(dbias + tl.program_id(0), tl.sum(tl.where(inside, gradient, 0.0)))
        at = dlogits + row[:, None].to(tl.int64) * columns + column[None, :]
        tl.store(at, (gradient * UNIT).to(dlogits.dtype.element_ty), mask=inside)


def siglip_forward(image, text, logit_scale, logit_bias, offset, needs_grad):
    inputs = image, text, logit_scale, logit_bias
    launch = _launch("siglip_forward", image, matmuls=3 if any(needs_grad) else 1)
    return _logit_gradients.siglip_forward(partial(_siglip, launch), *inputs, offset, needs_grad, launch["BLOCK_K"])


def _siglip(launch, image, text, logit_scale, logit_bias, offset, needs_grad):
    """Returns partial sums of the loss and, if it needs gradients, of dbias, `[1 or 2, n]`, and logit gradients."""
    (has_gradient,) = needs_grad
    grid = _grid(len(image), len(text), launch)
    sums = image.new_empty(1 + has_gradient, *grid, dtype=torch.float32)
    dlogits = image.new_empty(len(image), len(text)) if has_gradient else None
    with device_guard(image):
        siglip_kernel[grid](
            *(image, text, logit_scale, logit_bias, sums[0], sums[1] if has_gradient else None, dlogits),
            *(len(image), len(text), _steps(text, launch), offset),
            **launch,
        )
    return sums, dlogits


# --- both -----------------------------------------------------------------------------------------------------------


def _launch(op: str, image: Tensor, **sizes: int) -> dict[str, Any]:
    precision = float32_products(image)
    if precision == "ieee" and image.dtype == torch.float32:
        precision = "tf32x3"  # three TF32 matmuls with about the error of float32 (Ootomo and Yokota 2022)
    return config(op, {"depth": image.shape[1], **sizes}, image) | {"PRECISION": precision}


def _steps(padded: Tensor, launch: dict[str, Any]) -> int:
    """The number of BLOCK_K blocks."""
    return padded.shape[1] // int(launch["BLOCK_K"])


def _grid(rows: int, columns: int, launch: dict[str, Any]) -> tuple[int]:
    return (triton.cdiv(rows, launch["BLOCK_M"]) * triton.cdiv(columns, launch["BLOCK_N"]),)


# --- calls that are timed and compiled for each entry of CONFIGS ------------------------------------------------------


def contrastive_forward_calls(draw, depth):
    image, text, scale, _ = _pairs(draw, depth)
    yield image, text, scale, 0, False
    yield image, text, scale, 0, True


def contrastive_backward_calls(draw, depth, matmuls=3):
    image, text, scale, _ = _pairs(draw, depth)
    row_values = draw.statistic(len(image))
    logits = None if matmuls == 3 else draw.statistic(draw.pairs, draw.pairs)
    yield row_values, row_values, row_values, image, text, scale, row_values, row_values, logits, 0, (True, True)


def siglip_forward_calls(draw, depth, matmuls=3):
    yield *_pairs(draw, depth), 0, [matmuls == 3] * 4


def _pairs(draw, depth):
    return draw(draw.pairs, depth), draw(draw.pairs, depth), draw.statistic(), draw.statistic()
