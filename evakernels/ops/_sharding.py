"""Ops on DTensors, as sequence and tensor parallelism make them: each rank computes the rows of its shard.

Gradients of replicated parameters are `Partial` (sums over ranks that are still to be made), as those of torch's norms.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class ShardingRule(NamedTuple):
    """The layouts of an op's arguments, by name; those without one are `[C]`, parameters of all rows.

    Attributes:
        activations: arguments `[B, ..., C]`; the first is the op's first argument. Outputs have the same layout.
        samples: an argument `[B]`, without a gradient.
        whole_rows: given the arguments, whether a channel's result depends on other channels, so that rows stay whole.
    """

    activations: tuple[str, ...]
    samples: str | None = None
    whole_rows: Callable[..., bool] = lambda *args: True


def over_shards(name: str, op: Callable[..., Any], rule: ShardingRule, args: dict[str, Any]) -> Any:
    """`op` of DTensors, on this rank's shards; `args` are its arguments by name.

    Activations stay sharded where one of them is, but along the last dimension only if the op is elementwise; others
    are redistributed. Outputs are placed as activations are.

    Raises:
        TypeError: for a plain tensor beside DTensors.
        ValueError: for DTensors of several meshes.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    given = [arg for arg in args.values() if isinstance(arg, Tensor)]
    sharded = [arg for arg in given if isinstance(arg, DTensor)]
    if len(sharded) < len(given):
        raise TypeError(
            f"{name}: {len(sharded)} of {len(given)} tensors are DTensors; accepted: all or none "
            "(torch.distributed.tensor.distribute_tensor makes one of a plain tensor)"
        )
    first = args[rule.activations[0]]
    mesh, last = sharded[0].device_mesh, first.dim() - 1
    if any(arg.device_mesh != mesh for arg in sharded):
        raise ValueError(f"{name}: the DTensors are of several meshes; accepted: of one")
    cuttable = range(last) if rule.whole_rows(*args.values()) else range(last + 1)

    def of_activations(dimension: int) -> Any:
        found = (args[name].placements[dimension] for name in rule.activations)
        return next((Shard(p.dim) for p in found if isinstance(p, Shard) and p.dim in cuttable), Replicate())

    rows = tuple(map(of_activations, range(mesh.ndim)))
    samples = tuple(p if p.is_shard(0) else Replicate() for p in rows)
    channels = tuple(Shard(0) if p.is_shard(last) else Replicate() for p in rows)
    sums = tuple(Shard(0) if p.is_shard(last) else Partial() if p.is_shard() else p for p in rows)

    def local(name: str, arg: Any) -> Any:
        if not isinstance(arg, DTensor):
            return arg
        place, gradient = channels, sums
        if name in rule.activations:
            place = gradient = rows
        elif name == rule.samples:
            place = gradient = samples
        # A redistribution would make the sums of the gradient at once.
        arg = arg if arg.placements == place else arg.redistribute(mesh, place)
        return arg.to_local(grad_placements=gradient)

    outputs = op(*[local(name, arg) for name, arg in args.items()])
    shape, stride = first.shape, _contiguous_stride(first.shape)

    def whole(out: Tensor) -> Any:
        return DTensor.from_local(out, mesh, rows, run_check=False, shape=shape, stride=stride)

    return whole(outputs) if isinstance(outputs, Tensor) else tuple(map(whole, outputs))


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
