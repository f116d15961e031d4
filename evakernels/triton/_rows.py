"""Device functions for a tile of ROWS rows of WIDTH channels, in a block of the next power of two.

Sums and statistics are float32, offsets of rows 64-bit. A kernel is compiled for a width and for all numbers of rows
and strides: a stride counts VECTOR elements, a constant, so that rows at any multiple of 4 or 8 bytes are read in words
of that size.
"""

import triton
import triton.language as tl


@triton.jit
def tile_at(tile, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, first=0):
    """Indices of the tile's rows [ROWS, 1] and channels [1, BLOCK] from `first` on, and the mask of its elements."""
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    channel = (first + tl.arange(0, BLOCK))[None, :]
    return row, channel, (row < rows) & (channel < WIDTH)


@triton.jit
def load_tile(pointer, row, channel, inside, stride, VECTOR: tl.constexpr = 1):
    # Multiplying stride and VECTOR first would take registers throughout the kernel.
    return tl.load(pointer + row * stride * VECTOR + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, values, row, channel, inside, WIDTH: tl.constexpr):
    tl.store(pointer + row * WIDTH + channel, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_channels(pointer, channel, WIDTH: tl.constexpr):
    return tl.load(pointer + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def product(a, b):
    """a * b, rounded, not fused with an addition.

    For sums over rows, where lanes with fused first terms would have other sums than the rest; and for values from
    which a mean is subtracted: in short rows the two cancel, and the norm's scale enlarges the difference.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def row_mean(values, WIDTH: tl.constexpr):
    """[ROWS, 1]; values outside of the row are zero."""
    return tl.sum(values, 1)[:, None] / WIDTH


@triton.jit
def centred(values, inside, WIDTH: tl.constexpr):
    """The mean [ROWS, 1] and the deviations from it, zero outside of the row.

    The mean of the deviations corrects the rounding of the mean: divided by sqrt(eps) it would dominate a row of equal
    elements.
    """
    mean = row_mean(values, WIDTH)
    mean += row_mean(tl.where(inside, values - mean, 0.0), WIDTH)
    return mean, tl.where(inside, values - mean, 0.0)


@triton.jit
def store_partial_sum(pointer, values, channel, WIDTH: tl.constexpr):
    """The sum over the tile's rows, as this program's row of [programs, WIDTH]."""
    total = tl.sum(values, 0)[None, :]
    tl.store(pointer + tl.program_id(0) * WIDTH + channel, total, mask=channel < WIDTH)
