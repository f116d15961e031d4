"""Ops on DTensors, for sequence and tensor parallelism: each rank computes the rows of its shard.

Gradients of replicated parameters are `Partial`, as for torch's norms.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ShardingRule(NamedTuple):
    """The layouts of an op's arguments by name; all others are parameters `[C]`.

    Attributes:
        activations: arguments `[B, ..., C]`, or None. Outputs have the same layout.
        samples: an argument `[B]`, without a gradient.
        whole_rows: returns for the arguments whether a channel's result depends on other channels.
    """

    activations: tuple[str, ...]
    samples: str | None = None
    whole_rows: Callable[..., bool] = lambda *args: True


def over_shards(name: str, op: Callable[..., Any], rule: ShardingRule, args: dict[str, Any]) -> Any:
    """Runs `op` on this rank's shards of DTensors; `args` are its arguments by name.

    Activations stay sharded, along the last dimension only if the op is elementwise; otherwise they are redistributed.
    Outputs have the placements of the activations.

    Raises:
        TypeError: for a plain tensor together with DTensors.
        ValueError: for DTensors of several meshes.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    tensors = [arg for arg in args.values() if isinstance(arg, Tensor)]
    sharded = [arg for arg in tensors if isinstance(arg, DTensor)]
    if len(sharded) < len(tensors):
        raise TypeError(
            f"{name}: tensors must be all DTensors or none, got {len(sharded)} of {len(tensors)} "
            "(torch.distributed.tensor.distribute_tensor makes one of a plain tensor)"
        )
    activations = [args[name] for name in rule.activations if args.get(name) is not None]
    first = activations[0]
    mesh, last = sharded[0].device_mesh, first.dim() - 1
    if any(arg.device_mesh != mesh for arg in sharded):
        raise ValueError(f"{name}: DTensors must be of one mesh, got several")
    cuttable = range(last) if rule.whole_rows(*args.values()) else range(last + 1)

    def activation_placement(dimension: int) -> Any:
        placements = (activation.placements[dimension] for activation in activations)
        return next((Shard(p.dim) for p in placements if isinstance(p, Shard) and p.dim in cuttable), Replicate())

    rows = tuple(map(activation_placement, range(mesh.ndim)))
    samples = tuple(p if p.is_shard(0) else Replicate() for p in rows)
    channels = tuple(Shard(0) if p.is_shard(last) else Replicate() for p in rows)
    sums = tuple(Shard(0) if p.is_shard(last) else Partial() if p.is_shard() else p for p in rows)

    def to_shard(name: str, arg: Any) -> Any:
        if not isinstance(arg, DTensor):
            return arg
        place, gradient = channels, sums
        if name in rule.activations:
            place = gradient = rows
        elif name == rule.samples:
            place = gradient = samples
        # A redistribution would sum the gradient at once.
        arg = arg if arg.placements == place else arg.redistribute(mesh, place)
        return arg.to_local(grad_placements=gradient)

    outputs = op(*[to_shard(name, arg) for name, arg in args.items()])
    shape = first.shape
    stride = torch.empty(shape, device="meta").stride()

    def whole(out: Tensor) -> Any:
        return DTensor.from_local(out, mesh, rows, run_check=False, shape=shape, stride=stride)

    if isinstance(outputs, Tensor):
        return whole(outputs)
    return tuple(out if out is None or out.dim() != first.dim() else whole(out) for out in outputs)  # others are empty


# --- shards of parameters -------------------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """The local part of a DTensor, sharing its memory; any other tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    # A DTensor only exists after this slow import.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def shard_groups(tensor: Tensor) -> tuple[Any, ...]:
    """The process groups over which a tensor is sharded. Raises `TypeError` for a partial DTensor."""
    if not is_sharded(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise TypeError(f"placements of a DTensor must be Shard or Replicate, got {placements}")
    return tuple(mesh.get_group(i) for i, placement in enumerate(placements) if placement.is_shard())


def first_local_element(tensor: Tensor) -> int:
    """Index of the first local element in the whole tensor.

    Raises `TypeError` for a DTensor with shards that aren't ranges of elements: not along the first dimension, or more
    than one.
    """
    if not is_sharded(tensor):
        return 0
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    cut = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if not cut or not tensor.numel():
        return 0
    if len(cut) > 1 or not placements[cut[0]].is_shard(0):
        raise TypeError(f"placements of a DTensor must cut once, along the first dimension, got {placements}")
    # As torch.chunk cuts it.
    rows: int = -(-tensor.shape[0] // mesh.size(cut[0])) * mesh.get_local_rank(cut[0])
    return min(rows, tensor.shape[0]) * (tensor.numel() // tensor.shape[0])


def sum_over(values: Tensor, groups: tuple[Any, ...]) -> None:
    """Replaces values by their sums over the ranks of all groups."""
    for group in groups:
        torch.distributed.all_reduce(values, group=group)
