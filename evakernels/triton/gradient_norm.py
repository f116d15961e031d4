"""The norm of all tensors together: a program sums up the squares of one chunk, and torch adds up the chunks.

Each byte is read once, and the order of every addition is fixed.
"""

import torch
import triton
import triton.language as tl

from evakernels.triton._launch import on_device_of
from evakernels.triton._tensor_table import Table, buffer_at, chunk_at, load_floats


@triton.jit(do_not_specialize=["first"])
def squares_kernel(pointers, chunks, first, partials, GRAD: tl.constexpr, FITS: tl.constexpr, BLOCK: tl.constexpr):
    position = first + tl.program_id(0)
    tensor, begin, end = chunk_at(chunks, position, FITS)
    grad = buffer_at(pointers + tensor, GRAD, FITS)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        g = load_floats(grad, i, i < end)
        squares += g * g
    tl.store(partials + position, tl.sum(squares))


def gradient_norm(grads):
    with on_device_of(grads[0]):
        table = Table("gradient_norm", GRAD=grads)
        partials = table.room(len(table.layout.chunks), 1)
        table.launch(squares_kernel, partials)
    # There may be thousands, which float32 would add with a visible error.
    return partials.sum(dtype=torch.float64).float().sqrt()
