"""LayerNorm and RMSNorm, plain and joined with the residual add before or after: one kernel forward, one backward.

Absent tensors are None, and the kernel is compiled without them. In backward as many programs as run at a time loop
over the rows; each writes one row of partial sums over rows, which are added in a fixed order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import config, entry
from ..tuning.calls import EPS
from ._launch import dense, on_device_of, partial_sums, persistent_programs, row_strides, rows_of, total_of
from ._rows import centred, load_channels, load_tile, product, row_mean, store_partial_sum, store_tile, tile_at

_FORWARD = [
    entry(width=512, ROWS=4, num_warps=4, num_stages=1),
    entry(width=1024, ROWS=4, num_warps=8, num_stages=1),
    entry(width=2048, ROWS=2, num_warps=8, num_stages=1),
    entry(width=4096, ROWS=1, num_warps=8, num_stages=1),
    entry(width=8192, ROWS=1, num_warps=16, num_stages=1),
]
_BACKWARD_OF_ALL = [
    entry(width=512, ROWS=2, num_warps=4, num_stages=1),
    entry(width=1024, ROWS=2, num_warps=8, num_stages=1),
    entry(width=4096, ROWS=1, num_warps=16, num_stages=1),
    entry(width=8192, ROWS=1, num_warps=16, num_stages=1),
]
_BACKWARD = [*_BACKWARD_OF_ALL, entry(width=2048, ROWS=1, num_warps=8, num_stages=1)]
_BACKWARD_WITH_BRANCH = [*_BACKWARD_OF_ALL, entry(width=2048, ROWS=2, num_warps=16, num_stages=1)]
CONFIGS = {
    80: {
        "layer_norm_forward": _FORWARD,
        "layer_norm_backward": _BACKWARD,
        "add_layer_norm_forward": _FORWARD,
        "add_layer_norm_backward": _BACKWARD_WITH_BRANCH,
        "layer_norm_add_forward": _FORWARD,
        "layer_norm_add_backward": _BACKWARD_WITH_BRANCH,
    },
}
"""Launch configurations by compute capability; a GPU has those of the highest up to its own."""


@triton.jit(do_not_specialize=["rows", "sample_rows", "x_stride", "residual_stride"])
def forward_kernel(
    inputs,
    parameters,
    outputs,
    rows,
    sample_rows,
    x_stride: tl.int64,
    residual_stride: tl.int64,
    eps: tl.float32,
    VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    x, residual = inputs
    weight, bias, _, _ = parameters
    total, out, mean, rstd = outputs
    row, channel, inside = tile_at(tl.program_id(0), rows, WIDTH, ROWS, BLOCK)
    exists = row < rows
    values = load_tile(x, row, channel, inside, x_stride, VECTOR)
    if residual is not None:
        before = load_tile(residual, row, channel, inside, residual_stride, VECTOR)
    if total is not None:  # the add comes before the norm, which takes the unrounded sum
        values = before + scaled(values, parameters, row, channel, exists, sample_rows, WIDTH)
        store_tile(total, values, row, channel, inside, WIDTH)
    if mean is not None:
        centre, values = centred(values, inside, WIDTH)
        tl.store(mean + row, centre, mask=exists)
    scale = 1.0 / tl.sqrt(row_mean(product(values, values), WIDTH) + eps)
    tl.store(rstd + row, scale, mask=exists)
    values *= scale
    if weight is not None:
        values *= load_channels(weight, channel, WIDTH)
    if bias is not None:
        values += load_channels(bias, channel, WIDTH)
    if residual is not None and total is None:  # the add comes after the norm
        values = before + scaled(values, parameters, row, channel, exists, sample_rows, WIDTH)
    store_tile(out, values, row, channel, inside, WIDTH)


@triton.jit
def scaled(values, parameters, row, channel, exists, sample_rows, WIDTH: tl.constexpr):
    _, _, layer_scale, row_scale = parameters
    if layer_scale is not None:
        values *= load_channels(layer_scale, channel, WIDTH)
    if row_scale is not None:
        values *= scale_of(row_scale, row, exists, sample_rows)
    return values


@triton.jit
def scale_of(row_scale, row, exists, sample_rows):
    """[ROWS, 1]: the value of each row's sample."""
    return tl.load(row_scale + row.to(tl.int32) // sample_rows, mask=exists, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "sample_rows", "x_stride", "branch_stride"])
def backward_kernel(
    inputs,
    parameters,
    statistics,
    results,
    rows,
    sample_rows,
    x_stride: tl.int64,
    branch_stride: tl.int64,
    VECTOR: tl.constexpr,
    SCALE_NORMED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    dout, dtotal, x, branch = inputs
    weight, bias, layer_scale, row_scale = parameters
    mean, rstd = statistics
    dx, dbranch, dweight, dbias, dlayer_scale = results
    channel = tl.arange(0, BLOCK)[None, :]
    if dweight is not None:
        weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    if dbias is not None:
        bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    if dlayer_scale is not None:
        scale_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row, channel, inside = tile_at(tile, rows, WIDTH, ROWS, BLOCK)
        exists = row < rows
        d = load_tile(dout, row, channel, inside, WIDTH)
        normed = load_tile(x, row, channel, inside, x_stride, VECTOR)
        if mean is not None:
            normed -= tl.load(mean + row, mask=exists, other=0.0)  # outside of the row d is zero
        scale = tl.load(rstd + row, mask=exists, other=0.0)
        normed *= scale
        if weight is not None:
            weights = load_channels(weight, channel, WIDTH)
        if SCALE_NORMED:
            if row_scale is not None:
                d = product(d, scale_of(row_scale, row, exists, sample_rows))
            if dlayer_scale is not None:
                result = normed
                if weight is not None:
                    result *= weights
                if bias is not None:
                    result += load_channels(bias, channel, WIDTH)
                scale_sum += d * result
            if layer_scale is not None:
                d = product(d, load_channels(layer_scale, channel, WIDTH))
        if dbias is not None:
            bias_sum += d
        if dweight is not None:
            weight_sum += d * normed
        if weight is not None:
            # Only for the sums: kernels that hold d itself rounded spill registers.
            rounded = product(d, weights)
            d *= weights
        else:
            rounded = d
        along = row_mean(product(d, normed), WIDTH)
        if mean is not None:
            d -= row_mean(rounded, WIDTH)
        d = (d - normed * along) * scale
        if dtotal is not None:
            d += load_tile(dtotal, row, channel, inside, WIDTH)
        store_tile(dx, d, row, channel, inside, WIDTH)
        if not SCALE_NORMED:
            if row_scale is not None:
                d *= scale_of(row_scale, row, exists, sample_rows)
            if dlayer_scale is not None:
                scale_sum += d * load_tile(branch, row, channel, inside, branch_stride, VECTOR)
            if dbranch is not None:
                if layer_scale is not None:
                    d *= load_channels(layer_scale, channel, WIDTH)
                store_tile(dbranch, d, row, channel, inside, WIDTH)
    if dweight is not None:
        store_partial_sum(dweight, weight_sum, channel, WIDTH)
    if dbias is not None:
        store_partial_sum(dbias, bias_sum, channel, WIDTH)
    if dlayer_scale is not None:
        store_partial_sum(dlayer_scale, scale_sum, channel, WIDTH)


class Parameters(NamedTuple):
    weight: Tensor | None
    bias: Tensor | None
    layer_scale: Tensor | None = None
    row_scale: Tensor | None = None


def layer_norm_forward(x, weight, bias, eps, rms, out_dtype=None):
    out = torch.empty_like(x, dtype=out_dtype, memory_format=torch.contiguous_format)
    return out, *_forward("layer_norm_forward", x, None, Parameters(weight, bias), eps, rms, None, out)


def add_layer_norm_forward(residual, branch, weight, bias, layer_scale, row_scale, eps, rms, out_dtype=None):
    out, total = (
        torch.empty_like(residual, dtype=dtype, memory_format=torch.contiguous_format) for dtype in (out_dtype, None)
    )
    parameters = Parameters(weight, bias, layer_scale, row_scale)
    return out, total, *_forward("add_layer_norm_forward", branch, residual, parameters, eps, rms, total, out)


def layer_norm_add_forward(residual, branch, weight, bias, layer_scale, row_scale, eps, rms):
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    parameters = Parameters(weight, bias, layer_scale, row_scale)
    return out, *_forward("layer_norm_add_forward", branch, residual, parameters, eps, rms, None, out)


def _forward(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    parameters: Parameters,
    eps: float,
    rms: bool,
    total: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Writes `total` and `out`; returns mean and rstd."""
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    if x.numel() == 0:
        return mean, rstd
    x_rows, residual_rows = rows_of(x), rows_of(out if residual is None else residual)
    rows, width = x_rows.shape
    block = triton.next_power_of_2(width)
    options = config(op, {"width": block}, out)
    vector, strides = row_strides(x_rows, residual_rows)
    with on_device_of(x):
        forward_kernel[(triton.cdiv(rows, options["ROWS"]),)](
            *((x_rows, None if residual is None else residual_rows), tuple(map(dense, parameters))),
            *((total, out, None if rms else mean, rstd), rows, rows // len(x), *strides, eps),
            VECTOR=vector,
            WIDTH=width,
            BLOCK=block,
            **options,
        )
    return mean, rstd


def layer_norm_backward(dy, x, weight, mean, rstd, rms, needs_grad):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    inputs, statistics = (dy, None, x, None), (None if rms else mean, rstd)
    op, parameters = "layer_norm_backward", Parameters(weight, None)
    return dx, *_backward(op, inputs, parameters, statistics, (dx, None), (*needs_grad, False))[:2]


def add_layer_norm_backward(dy, dx, x, branch, weight, layer_scale, row_scale, mean, rstd, rms, needs_grad):
    op, parameters = "add_layer_norm_backward", Parameters(weight, None, layer_scale, row_scale)
    needs_branch, *of_parameters = needs_grad
    dresidual = torch.empty_like(x)
    dbranch = torch.empty_like(x, dtype=branch.dtype) if needs_branch else None
    inputs, statistics = (dy, dx, x, branch if needs_grad[-1] else None), (None if rms else mean, rstd)
    sums = _backward(op, inputs, parameters, statistics, (dresidual, dbranch), of_parameters)
    return dresidual, rstd.new_empty(0) if dbranch is None else dbranch, *sums


def layer_norm_add_backward(dx, branch, weight, bias, layer_scale, row_scale, mean, rstd, rms, needs_grad):
    bias = bias if needs_grad[-1] else None  # only layer_scale's gradient needs it
    op, parameters = "layer_norm_add_backward", Parameters(weight, bias, layer_scale, row_scale)
    dbranch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    inputs, statistics = (dx, None, branch, None), (None if rms else mean, rstd)
    return dbranch, *_backward(op, inputs, parameters, statistics, (dbranch, None), needs_grad)


def _backward(
    op: str,
    inputs: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    parameters: Parameters,
    statistics: tuple[Tensor | None, Tensor],
    outputs: tuple[Tensor, Tensor | None],
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes dx and dbranch; returns the gradients of weight, bias and layer_scale, empty if not needed."""
    dout, dtotal, x, branch = inputs
    x_rows, branch_rows = rows_of(x), rows_of(x if branch is None else branch)
    rows, width = x_rows.shape
    block = triton.next_power_of_2(width)
    options = config(op, {"width": block}, x)
    programs = persistent_programs(x, triton.cdiv(rows, options["ROWS"]), options["num_warps"])
    weight, _, layer_scale, _ = parameters
    sums = [partial_sums(programs, *of) for of in zip((weight, weight, layer_scale), needs_grad, strict=True)]
    if x.numel() > 0:
        vector, strides = row_strides(x_rows, branch_rows)
        with on_device_of(x):
            backward_kernel[(programs,)](
                (dense(dout), dense(dtotal), x_rows, None if branch is None else branch_rows),
                *(tuple(map(dense, parameters)), statistics, (*outputs, *sums), rows, rows // len(x), *strides),
                VECTOR=vector,
                SCALE_NORMED=dtotal is None,
                WIDTH=width,
                BLOCK=block,
                **options,
            )
    return total_of(weight, sums[0], x), total_of(weight, sums[1], x), total_of(layer_scale, sums[2], x)


# --- calls that are timed and compiled for each entry of CONFIGS ------------------------------------------------------


def layer_norm_forward_calls(draw, width):
    x, _, weight, bias, _, _ = _norm(draw, width)
    yield x, weight, bias, EPS, False
    yield x, weight, None, EPS, True
    yield x, None, None, EPS, False
    yield x.float(), weight.float(), bias.float(), EPS, False, draw.dtype  # of a float32 stream


def layer_norm_backward_calls(draw, width):
    x, dy, weight, *_ = _norm(draw, width)
    mean, rstd = _statistics(draw, width)
    yield dy, x, weight, mean, rstd, False, (True, True)
    yield dy, x, weight, mean[:0], rstd, True, (True, False)
    yield dy, x, None, mean, rstd, False, (False, False)
    yield dy, x.float(), weight.float(), mean, rstd, False, (True, True)


def add_layer_norm_forward_calls(draw, width):
    residual, branch, weight, bias, layer_scale, row_scale = _norm(draw, width)
    yield residual, branch, weight, bias, layer_scale, row_scale, EPS, False
    yield residual, branch, weight, bias, None, None, EPS, False
    yield residual, branch, weight, None, None, None, EPS, True


def add_layer_norm_backward_calls(draw, width):
    x, branch, weight, _, layer_scale, row_scale = _norm(draw, width)
    dy, dx = draw(*x.shape), draw(*x.shape)
    mean, rstd = _statistics(draw, width)
    yield dy, dx, x, branch, weight, layer_scale, row_scale, mean, rstd, False, (True, True, True, True)
    yield dy, dx, x, branch[:0], weight, None, None, mean, rstd, False, (False, True, True, False)
    yield dy, dx, x, branch[:0], weight, None, None, mean[:0], rstd, True, (False, True, False, False)


layer_norm_add_forward_calls = add_layer_norm_forward_calls


def layer_norm_add_backward_calls(draw, width):
    dx, branch, weight, bias, layer_scale, row_scale = _norm(draw, width)
    mean, rstd = _statistics(draw, width)
    yield dx, branch, weight, bias, layer_scale, row_scale, mean, rstd, False, (True, True, True)
    yield dx, branch, weight, bias, None, None, mean, rstd, False, (True, True, False)
    yield dx, branch, weight, None, None, None, mean[:0], rstd, True, (True, False, False)


def _norm(draw, width):
    """Two activations, weight, bias, layer_scale and row_scale; width as the 768 channels of EVA02-B."""
    width = 3 * width // 4
    size = draw.batch, draw.elements // draw.batch // width, width
    return draw(*size), draw(*size), draw(width), draw(width), draw(width), draw.statistic(draw.batch)


def _statistics(draw, width):
    size = draw.batch, draw.elements // draw.batch // (3 * width // 4)
    return draw.statistic(*size), draw.statistic(*size)
