"""What the launchers of all families share."""

import math
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


@cache
def _multiprocessors(device: int) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def rows_of(tensor: Tensor) -> Tensor:
    """`[..., F]` as `[rows, F]` with dense rows: a view where the rows are equally far apart, else a copy."""
    rows = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])  # F may be 0
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def dense(tensor: Tensor | None) -> Tensor | None:
    """Contiguous; most parameters are."""
    return None if tensor is None else tensor.contiguous()
