"""What the kernels over rows share: a tile of ROWS rows, each of WIDTH channels in a block of the next power of two.

Sums and statistics are float32. A row's place in memory is a 64-bit number. A kernel is compiled for a width, but for
all numbers of rows and all strides: a stride counts VECTOR elements, which the compiler knows, so that rows which begin
at any multiple of 4 or 8 bytes are still read in pieces of that size.
"""

import triton
import triton.language as tl


@triton.jit
def tile_at(tile, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, first=0):
    """Numbers of the tile's rows [ROWS, 1] and channels [1, BLOCK] from `first` on, and which of its elements exist."""
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    channel = (first + tl.arange(0, BLOCK))[None, :]
    return row, channel, (row < rows) & (channel < WIDTH)


@triton.jit
def load_tile(pointer, row, channel, inside, stride, VECTOR: tl.constexpr = 1):
    # Strides that are multiplied before the rows are would take registers throughout the kernel.
    return tl.load(pointer + row * stride * VECTOR + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, values, row, channel, inside, WIDTH: tl.constexpr):
    tl.store(pointer + row * WIDTH + channel, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_channels(pointer, channel, WIDTH: tl.constexpr):
    return tl.load(pointer + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def product(a, b):
    """Rounded, and fused with no sum.

    For what is summed over a row, where lanes would have different sums if the first step of theirs were fused; and for
    what a mean is taken from: in a row of few elements the two cancel, and the norm's scale makes what is left large.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def row_mean(values, WIDTH: tl.constexpr):
    """[ROWS, 1]; values outside of the row are zero."""
    return tl.sum(values, 1)[:, None] / WIDTH


@triton.jit
def centred(values, inside, WIDTH: tl.constexpr):
    """The mean [ROWS, 1] and the values without it, zero outside of the row.

    The deviations have a mean of their own, by which rounding has moved the first. Of a row of equal elements it would
    be all that is left, divided by sqrt(eps).
    """
    mean = row_mean(values, WIDTH)
    mean += row_mean(tl.where(inside, values - mean, 0.0), WIDTH)
    return mean, tl.where(inside, values - mean, 0.0)


@triton.jit
def store_partial_sum(pointer, values, channel, WIDTH: tl.constexpr):
    """The sum over the tile's rows, as this program's row of [programs, WIDTH]."""
    total = tl.sum(values, 0)[None, :]
    tl.store(pointer + tl.program_id(0) * WIDTH + channel, total, mask=channel < WIDTH)
