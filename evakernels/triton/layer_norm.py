"""LayerNorm and RMSNorm, plain and joined with the residual add before or after: one kernel forward, one backward.

Absent tensors are None, and the kernel is compiled without them. In backward as many programs as run at a time loop
over the rows; each writes one row of partial sums over rows, which are added in a fixed order.
"""

import torch
import triton
import triton.language as tl

from ..tuning import config, entry
from ..tuning.calls import EPS
from ._launch import dense, device_guard, partial_sums, persistent_programs, row_strides, row_view, sum_partials
from ._rows import centred, load_channels, load_tile, product, row_mean, store_partial_sum, store_tile, tile_at

_FORWARD = [
    entry(width=512, ROWS=4, num_warps=4, num_stages=1),
    entry(width=1024, ROWS=4, num_warps=8, num_stages=1),
    entry(width=2048, ROWS=2, num_warps=8, num_stages=1),
    entry(width=4096, ROWS=1, num_warps=8, num_stages=1),
    entry(width=8192, ROWS=1, num_warps=16, num_stages=1),
]
_BACKWARD = [
    entry(width=512, ROWS=2, num_warps=4, num_stages=1),
    entry(width=1024, ROWS=2, num_warps=8, num_stages=1),
    entry(width=2048, ROWS=2, num_warps=16, num_stages=1),
    entry(width=4096, ROWS=1, num_warps=16, num_stages=1),
    entry(width=8192, ROWS=1, num_warps=16, num_stages=1),
]
CONFIGS = {80: {"layer_norm_forward": _FORWARD, "layer_norm_backward": _BACKWARD}}
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
    RMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    x, residual = inputs
    weight, bias, _, _ = parameters
    total, out, statistics = outputs
    row, channel, inside = tile_at(tl.program_id(0), rows, WIDTH, ROWS, BLOCK)
    exists = row < rows
    values = load_tile(x, row, channel, inside, x_stride, VECTOR)
    if residual is not None:
        before = load_tile(residual, row, channel, inside, residual_stride, VECTOR)
    if total is not None:  # the add comes before the norm, which takes the unrounded sum
        values = before + scaled(values, parameters, row, channel, exists, sample_rows, WIDTH)
        store_tile(total, values, row, channel, inside, WIDTH)
    rstd = statistics
    if not RMS:
        centre, values = centred(values, inside, WIDTH)
        tl.store(statistics + row, centre, mask=exists)
        rstd += rows
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
    RMS: tl.constexpr,
    SCALE_NORMED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    dout, dtotal, x, branch = inputs
    weight, bias, layer_scale, row_scale = parameters
    rstd = statistics if RMS else statistics + rows
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
        if not RMS:
            normed -= tl.load(statistics + row, mask=exists, other=0.0)  # outside of the row d is zero
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
        if not RMS:
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


def layer_norm_forward(
    x, weight, bias, eps, rms, out_dtype=None, residual=None, layer_scale=None, row_scale=None, add_first=False
):
    stream = x if residual is None else residual
    out = torch.empty_like(stream, dtype=out_dtype, memory_format=torch.contiguous_format)
    statistics = x.new_empty(1 if rms else 2, *x.shape[:-1], dtype=torch.float32)
    total = torch.empty_like(stream, memory_format=torch.contiguous_format) if add_first else None
    if x.numel() > 0:
        x_rows, residual_rows = row_view(x), row_view(stream)
        rows, width = x_rows.shape
        block = triton.next_power_of_2(width)
        options = config("layer_norm_forward", {"width": block}, out)
        vector, strides = row_strides(x_rows, residual_rows)
        parameters = tuple(map(dense, (weight, bias, layer_scale, row_scale)))
        with device_guard(x):
            forward_kernel[(triton.cdiv(rows, options["ROWS"]),)](
                *((x_rows, None if residual is None else residual_rows), parameters, (total, out, statistics)),
                *(rows, rows // len(x), *strides, eps),
                VECTOR=vector,
                RMS=rms,
                WIDTH=width,
                BLOCK=block,
                **options,
            )
    return out, statistics.new_empty(0) if total is None else total, statistics


def layer_norm_backward(
    dy, x, weight, statistics, needs_grad, bias=None, layer_scale=None, row_scale=None, dtotal=None, branch=None
):
    *needs_norm, needs_layer_scale, needs_branch = needs_grad
    if not needs_layer_scale:  # only its gradient needs their values
        bias = None
    taken = branch if needs_layer_scale else None
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    needs_branch = needs_branch and branch is not None
    dbranch = torch.empty_like(dx, dtype=branch.dtype) if needs_branch else None
    x_rows, branch_rows = row_view(x), row_view(x if taken is None else taken)
    rows, width = x_rows.shape
    block = triton.next_power_of_2(width)
    options = config("layer_norm_backward", {"width": block}, x)
    programs = persistent_programs(x, triton.cdiv(rows, options["ROWS"]), options["num_warps"])
    needs_sums = (*needs_norm, needs_layer_scale)
    sums = [partial_sums(programs, *of) for of in zip((weight, weight, layer_scale), needs_sums, strict=True)]
    if x.numel() > 0:
        vector, strides = row_strides(x_rows, branch_rows)
        inputs = dense(dy), dense(dtotal), x_rows, None if taken is None else branch_rows
        parameters = tuple(map(dense, (weight, bias, layer_scale, row_scale)))
        with device_guard(x):
            backward_kernel[(programs,)](
                *(inputs, parameters, dense(statistics), (dx, dbranch, *sums), rows, rows // len(x), *strides),
                VECTOR=vector,
                RMS=len(statistics) == 1,
                SCALE_NORMED=dtotal is None,
                WIDTH=width,
                BLOCK=block,
                **options,
            )
    gradients = [sum_partials(*of, x) for of in zip((weight, weight, layer_scale), sums, strict=True)]
    return dx, statistics.new_empty(0) if dbranch is None else dbranch, *gradients


# --- calls that are timed and compiled for each entry of CONFIGS ------------------------------------------------------


def layer_norm_forward_calls(draw, width):
    residual, x, weight, bias, layer_scale, row_scale = _norm(draw, width)
    yield x, weight, bias, EPS, False, None, residual, layer_scale, row_scale, True
    yield x, weight, bias, EPS, False, None, residual, None, None, True
    yield x, weight, None, EPS, True, None, residual, None, None, True
    yield x, weight, bias, EPS, False, None, residual, layer_scale, row_scale
    yield x, weight, bias, EPS, False, None, residual
    yield x, weight, None, EPS, True, None, residual
    yield x, weight, bias, EPS, False
    yield x, weight, None, EPS, True
    yield x, None, None, EPS, False
    yield x.float(), weight.float(), bias.float(), EPS, False, draw.dtype  # of a float32 stream


def layer_norm_backward_calls(draw, width):
    x, dy, weight, bias, layer_scale, row_scale = _norm(draw, width)
    dtotal, branch = draw(*x.shape), draw(*x.shape)
    statistics = draw.statistic(2, *x.shape[:-1])
    scales, add = (None, layer_scale, row_scale), (None, None, None, dtotal, branch[:0])
    yield dy, x, weight, statistics, (True, True, True, True), *scales, dtotal, branch
    yield dy, x, weight, statistics, (True, True, False, False), *add
    yield dy, x, weight, statistics[:1], (True, False, False, False), *add
    yield dy, x, weight, statistics, (True, True, True, False), bias, layer_scale, row_scale
    yield dy, x, weight, statistics, (True, True, False, False)
    yield dy, x, weight, statistics[:1], (True, False, False, False)
    yield dy, x, None, statistics, (False, False, False, False)
    yield dy, x.float(), weight.float(), statistics, (True, True, False, False)


def _norm(draw, width):
    """Two activations, weight, bias, layer_scale and row_scale; width as the 768 channels of EVA02-B."""
    width = 3 * width // 4
    size = draw.batch, draw.elements // draw.batch // width, width
    return draw(*size), draw(*size), draw(width), draw(width), draw(width), draw.statistic(draw.batch)
