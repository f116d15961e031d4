"""What the launchers of all families share."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def multiprocessors(tensor: Tensor) -> int:
    """Of the tensor's GPU. Where kernels are interpreted: so few that programs take several turns in small tests."""
    return _multiprocessors(tensor.device.index) if tensor.is_cuda else 3


def persistent_programs(tensor: Tensor, tiles: int, num_warps: int) -> int:
    """Programs that walk over all tiles: as many as run at a time with 128 registers a thread, which is 16 warps a
    multiprocessor."""
    return min(tiles, multiprocessors(tensor) * max(1, 16 // num_warps))


def partial_sums(programs: int, parameter: Tensor | None, wanted: bool) -> Tensor | None:
    """Room for the gradient of a parameter `[F]`, a row a program; None where there is none or none is wanted."""
    if parameter is None or not wanted:
        return None
    return parameter.new_empty(programs, len(parameter), dtype=torch.float32)


def total_of(parameter: Tensor | None, partial: Tensor | None, like: Tensor) -> Tensor:
    """That gradient; empty where there are no partial sums."""
    if parameter is None or partial is None:
        return like.new_empty(0, dtype=torch.float32)
    return partial.sum(0).to(parameter.dtype)


@cache
def _multiprocessors(device: int) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def rows_of(tensor: Tensor) -> Tensor:
    """`[..., F]` as `[rows, F]` with dense rows: a view where the rows are equally far apart, else a copy."""
    rows = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])  # F may be 0
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def in_vectors(strides: Sequence[int], itemsize: int) -> tuple[int, list[int]]:
    """VECTOR, the most elements within 16 bytes that divide all strides, and the strides in that unit.

    So a kernel is compiled for an alignment and not for strides. By itself Triton sees only what divides by 16, and
    rows of 88 elements don't.
    """
    vector = math.gcd(16 // itemsize, *strides)
    return vector, [stride // vector for stride in strides]


def row_strides(*rows: Tensor) -> tuple[int, list[int]]:
    """The same of tensors `[rows, F]`: of the strides between their rows."""
    return in_vectors([x.stride(0) for x in rows], min(x.element_size() for x in rows))


def float32_products(tensor: Tensor) -> str:
    """The `input_precision` of products of this tensor: in float32 that of torch's own products on GPUs.

    `torch.set_float32_matmul_precision` sets it, or `torch.backends.cuda.matmul.fp32_precision`. "highest" means sums
    of float32 products; for "high" and "medium" cuBLAS rounds to TF32, and so do the kernels.
    """
    rounded = tensor.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if rounded else "ieee"


def dense(tensor: Tensor | None) -> Tensor | None:
    """Contiguous; most parameters are."""
    return None if tensor is None else tensor.contiguous()
