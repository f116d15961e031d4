"""One rank of many, without the others: collectives return at once, and tensors have no data."""

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Module
from torch.testing._internal.distributed.fake_pg import FakeStore

from evaclip.errors import UserError
from evaclip.train.distributed import World, device_of


def fake_ranks(device: str, size: int) -> World:
    """The world of rank 0 of `size` ranks. Collectives return at once with uninitialised memory.

    Raises:
        UserError: a process group exists already, or the device does not exist.
    """
    if size < 1:
        raise UserError(f"--as-gpus must be at least 1, got {size}")
    if (dist.is_available() and dist.is_initialized()) or dist.is_torchelastic_launched():
        raise UserError("--as-gpus and `evaclip plan` stand for many ranks: start one process, without torchrun")
    found = device_of(device)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    return World(found, 0, size, dist.group.WORLD, dist.group.WORLD, lambda: dist.group.WORLD)


def without_data(model: Module, mode: FakeTensorMode) -> None:
    """Gives a model on the meta device parameters and buffers that count as memory of a CPU."""
    with mode:
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))
