"""Helpers of the launchers of all families."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 3 of a CPU, so that programs of small interpreted tests loop."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def persistent_programs(tensor: Tensor, tiles: int, num_warps: int) -> int:
    """Programs that loop over all tiles: 16 warps a multiprocessor, as many as run with 128 registers a thread."""
    return min(tiles, multiprocessors(tensor.device) * max(1, 16 // num_warps))


def partial_sums(programs: int, parameter: Tensor | None, needs_grad: bool) -> Tensor | None:
    """Memory for partial sums of a parameter's gradient, `[programs, F]`; None if it isn't needed."""
    if parameter is None or not needs_grad:
        return None
    return parameter.new_empty(programs, len(parameter), dtype=torch.float32)


def sum_partials(parameter: Tensor | None, partial: Tensor | None, like: Tensor) -> Tensor:
    """The gradient from partial sums; empty without them."""
    if parameter is None or partial is None:
        return like.new_empty(0, dtype=torch.float32)
    return partial.sum(0).to(parameter.dtype)


def row_view(tensor: Tensor) -> Tensor:
    """`[..., F]` as `[rows, F]` with dense rows: a view if possible, otherwise a copy."""
    rows = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])  # F may be 0
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def in_vectors(strides: Sequence[int], itemsize: int) -> tuple[int, list[int]]:
    """VECTOR, the most elements within 16 bytes that divide all strides, and the strides in units of VECTOR.

    A kernel is compiled for an alignment instead of strides. Triton by itself only notices divisibility by 16.
    """
    vector = math.gcd(16 // itemsize, *strides)
    return vector, [stride // vector for stride in strides]


def row_strides(*rows: Tensor) -> tuple[int, list[int]]:
    """`in_vectors` of the strides between the rows of tensors `[rows, F]`."""
    return in_vectors([x.stride(0) for x in rows], min(x.element_size() for x in rows))


def float32_products(tensor: Tensor) -> str:
    """The `input_precision` of matmuls, for float32 as in torch: `torch.set_float32_matmul_precision`."""
    rounded = tensor.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if rounded else "ieee"


def dense(tensor: Tensor | None) -> Tensor | None:
    """The contiguous tensor, or None."""
    return None if tensor is None else tensor.contiguous()
