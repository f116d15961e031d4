"""silu(gate) * up, alone or followed by LayerNorm: each byte is read and written once.

With the norm a program has whole rows, otherwise pieces of rows along the second dimension of the grid. In backward as
many programs as run at a time loop over the rows; each writes one row of partial sums for the gradients of the norm's
weight and bias, which are added in a fixed order. Statistics count the first COUNT of WIDTH channels; others are zero.
"""

import torch
import triton
import triton.language as tl

from ..tuning import config, entry
from ..tuning.calls import EPS
from . import MAX_SWIGLU_WIDTH
from ._launch import dense, device_guard, partial_sums, persistent_programs, row_strides, row_view, sum_partials
from ._rows import centred, load_channels, load_tile, product, row_mean, store_partial_sum, store_tile, tile_at

CONFIGS = {
    80: {
        "swiglu_forward": [
            entry(width=512, ROWS=4, num_warps=4, num_stages=1),
            entry(width=1024, ROWS=4, num_warps=8, num_stages=1),
            entry(width=2048, ROWS=2, num_warps=8, num_stages=1),
            entry(width=4096, ROWS=1, num_warps=8, num_stages=1),
        ],
        "swiglu_backward": [
            entry(width=512, ROWS=2, num_warps=4, num_stages=1),
            entry(width=1024, ROWS=2, num_warps=8, num_stages=1),
            entry(width=2048, ROWS=2, num_warps=16, num_stages=1),
            entry(width=4096, ROWS=1, num_warps=16, num_stages=1),
        ],
    },
}
"""Launch configurations by compute capability; a GPU has those of the highest up to its own."""


def _pieces(width: int) -> tuple[int, int]:
    """Channels of a program, and pieces of a row."""
    block = min(max(triton.next_power_of_2(width), 1), MAX_SWIGLU_WIDTH)
    return block, triton.cdiv(width, block)


@triton.jit(do_not_specialize=["rows", "gate_stride", "up_stride"])
def forward_kernel(
    inputs,
    outputs,
    rows,
    gate_stride: tl.int64,
    up_stride: tl.int64,
    eps: tl.float32,
    VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    gate, up, weight, bias = inputs
    out, mean, rstd = outputs
    row, channel, inside = tile_at(tl.program_id(0), rows, WIDTH, ROWS, BLOCK, tl.program_id(1) * BLOCK)
    g = load_tile(gate, row, channel, inside, gate_stride, VECTOR)
    values = product(g * tl.sigmoid(g), load_tile(up, row, channel, inside, up_stride, VECTOR))
    if weight is not None:
        centre, values = centred(values, inside & (channel < COUNT), COUNT)
        scale = 1.0 / tl.sqrt(row_mean(product(values, values), COUNT) + eps)
        values = values * scale * load_channels(weight, channel, WIDTH)
        if bias is not None:
            values += load_channels(bias, channel, WIDTH)
        tl.store(mean + row, centre, mask=row < rows)
        tl.store(rstd + row, scale, mask=row < rows)
    store_tile(out, values, row, channel, inside, WIDTH)


@triton.jit(do_not_specialize=["rows", "gate_stride", "up_stride"])
def backward_kernel(
    inputs,
    outputs,
    rows,
    gate_stride: tl.int64,
    up_stride: tl.int64,
    VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    dout, gate, up, weight, mean, rstd = inputs
    dgate, dup, dweight, dbias = outputs
    channel = tl.arange(0, BLOCK)[None, :]
    if weight is not None:
        weights = load_channels(weight, channel, WIDTH)
    if dweight is not None:
        weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    if dbias is not None:
        bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row, channel, inside = tile_at(tile, rows, WIDTH, ROWS, BLOCK, tl.program_id(1) * BLOCK)
        d = load_tile(dout, row, channel, inside, WIDTH)
        g = load_tile(gate, row, channel, inside, gate_stride, VECTOR)
        u = load_tile(up, row, channel, inside, up_stride, VECTOR)
        sigmoid = tl.sigmoid(g)
        silu = g * sigmoid
        if weight is not None:
            scale = tl.load(rstd + row, mask=row < rows, other=0.0)
            centre = tl.load(mean + row, mask=row < rows, other=0.0)
            normed = (product(silu, u) - centre) * scale  # outside of the row d is zero
            if dweight is not None:
                weight_sum += d * normed
            if dbias is not None:
                bias_sum += d
            d = product(d, weights)
            d = (d - row_mean(d, COUNT) - normed * row_mean(product(d, normed), COUNT)) * scale
        dsilu = sigmoid * (1.0 + g * (1.0 - sigmoid))
        store_tile(dgate, d * u * dsilu, row, channel, inside, WIDTH)
        store_tile(dup, d * silu, row, channel, inside, WIDTH)
    if dweight is not None:
        store_partial_sum(dweight, weight_sum, channel, WIDTH)
    if dbias is not None:
        store_partial_sum(dbias, bias_sum, channel, WIDTH)


def swiglu_forward(gate, up, norm_weight, norm_bias, eps, padding=0):
    gate_rows, up_rows = row_view(gate), row_view(up)
    rows, width = gate_rows.shape
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    statistics = gate.shape[:-1] if norm_weight is not None else (0,)
    mean, rstd = (gate.new_empty(statistics, dtype=torch.float32) for _ in range(2))
    if out.numel() == 0:
        return out, mean, rstd
    block, pieces = _pieces(width)
    options = config("swiglu_forward", {"width": block}, gate)
    vector, strides = row_strides(gate_rows, up_rows)
    with device_guard(gate):
        forward_kernel[(triton.cdiv(rows, options["ROWS"]), pieces)](
            (gate_rows, up_rows, dense(norm_weight), dense(norm_bias)),
            *((out, mean, rstd), rows, *strides, eps),
            VECTOR=vector,
            WIDTH=width,
            COUNT=width - padding,
            BLOCK=block,
            **options,
        )
    return out, mean, rstd


def swiglu_backward(dout, gate, up, norm_weight, mean, rstd, needs_grad, padding=0):
    gate_rows, up_rows = row_view(gate), row_view(up)
    rows, width = gate_rows.shape
    dgate, dup = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))
    block, pieces = _pieces(width)
    options = config("swiglu_backward", {"width": block}, gate)
    programs = persistent_programs(gate, triton.cdiv(rows, options["ROWS"]), options["num_warps"])
    sums = [partial_sums(programs, norm_weight, needed) for needed in needs_grad]
    if gate.numel() > 0:
        vector, strides = row_strides(gate_rows, up_rows)
        with device_guard(gate):
            backward_kernel[(programs, pieces)](
                (dense(dout), gate_rows, up_rows, dense(norm_weight), mean, rstd),
                *((dgate, dup, *sums), rows, *strides),
                VECTOR=vector,
                WIDTH=width,
                COUNT=width - padding,
                BLOCK=block,
                **options,
            )
    dweight, dbias = (sum_partials(norm_weight, partial, gate) for partial in sums)
    return dgate, dup, dweight, dbias


# --- calls that are timed and compiled for each entry of CONFIGS ------------------------------------------------------


def swiglu_forward_calls(draw, width):
    gate, up, weight, bias = _swiglu(draw, width)
    yield gate, up, weight, bias, EPS
    yield gate, up, weight, None, EPS
    yield gate, up, None, None, EPS


def swiglu_backward_calls(draw, width):
    gate, up, weight, _ = _swiglu(draw, width)
    dout, mean, rstd = draw(*gate.shape), draw.statistic(len(gate)), draw.statistic(len(gate))
    yield dout, gate, up, weight, mean, rstd, (True, True)
    yield dout, gate, up, None, mean[:0], rstd[:0], (False, False)


def _swiglu(draw, width):
    """Halves of a packed projection with a width that vectors don't divide, such as EVA02-L's 2,730 channels."""
    width = 2 * (width // 3)
    gate, up = draw(draw.elements // width, 2 * width).chunk(2, -1)
    return gate, up, draw(width), draw(width)
