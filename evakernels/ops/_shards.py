"""Parameters that `fully_shard` has cut up: what this process holds of them, and who holds the rest."""

import sys
from typing import Any

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that lies in this process, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    # The import takes longer than many a step, and nobody has a DTensor who hasn't made it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def groups_of(tensor: Tensor) -> tuple[Any, ...]:
    """The process groups over which a tensor is cut: a sum over its elements is one over this process's, then these.

    Raises:
        TypeError: for a DTensor that holds sums still to be made.
    """
    if not is_sharded(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise TypeError(f"a DTensor is placed as {placements}; accepted: Shard and Replicate")
    return tuple(mesh.get_group(i) for i, placement in enumerate(placements) if placement.is_shard())


def first_element_of(tensor: Tensor) -> int:
    """Number of the first element that lies in this process, within the whole tensor.

    Raises:
        TypeError: for a DTensor whose parts aren't ranges of elements: one that isn't cut along its first dimension,
            or more than once.
    """
    if not is_sharded(tensor):
        return 0
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    cut = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if not cut or not tensor.numel():
        return 0
    if len(cut) > 1 or not placements[cut[0]].is_shard(0):
        raise TypeError(f"a DTensor is placed as {placements}; accepted: cut once, along the first dimension")
    # As torch.chunk cuts it.
    rows: int = -(-tensor.shape[0] // mesh.size(cut[0])) * mesh.get_local_rank(cut[0])
    return min(rows, tensor.shape[0]) * (tensor.numel() // tensor.shape[0])


def sum_over(values: Tensor, groups: tuple[Any, ...]) -> None:
    """Replaces values by their sums over the processes of all groups."""
    for group in groups:
        torch.distributed.all_reduce(values, group=group)
