"""Ops on DTensors, as sequence and tensor parallelism make them: each process computes the rows that it holds.

Gradients of parameters that all processes have are sums over processes still to be made, `Partial`, as those of torch's
own norms are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Rule(NamedTuple):
    """What the arguments of an op are to its rows; those that nothing names are `[C]`, the same in all rows."""

    activations: int = 1
    """This many leading arguments are `[B, ..., C]`, as are the outputs."""

    samples: int | None = None
    """The number of the argument that is `[B]`; it gets no gradient."""

    whole_rows: Callable[..., bool] = lambda *args: True
    """Given the arguments, whether a channel's result depends on others', so that no row may be cut."""


def over_shards(name: str, op: Callable[..., Any], rule: Rule, args: tuple[Any, ...]) -> Any:
    """`op(*args)` of DTensors, on what this process holds of each.

    Activations stay cut where one of them is, but along the last dimension only if the op is elementwise; what doesn't
    fit to that is redistributed. Outputs lie as activations do.

    Raises:
        TypeError: for a plain tensor beside DTensors.
        ValueError: for DTensors of several meshes.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    given = [arg for arg in args if isinstance(arg, Tensor)]
    sharded = [arg for arg in given if isinstance(arg, DTensor)]
    if len(sharded) < len(given):
        raise TypeError(
            f"{name}: {len(sharded)} of {len(given)} tensors are DTensors; accepted: all or none "
            "(torch.distributed.tensor.distribute_tensor makes one of a plain tensor)"
        )
    mesh, last = sharded[0].device_mesh, args[0].dim() - 1
    if any(arg.device_mesh != mesh for arg in sharded):
        raise ValueError(f"{name}: the DTensors are of several meshes; accepted: of one")
    cuttable = range(last) if rule.whole_rows(*args) else range(last + 1)

    def of_activations(number: int) -> Any:
        found = (arg.placements[number] for arg in args[: rule.activations])
        return next((Shard(p.dim) for p in found if isinstance(p, Shard) and p.dim in cuttable), Replicate())

    rows = tuple(map(of_activations, range(mesh.ndim)))
    samples = tuple(p if p.is_shard(0) else Replicate() for p in rows)
    channels = tuple(Shard(0) if p.is_shard(last) else Replicate() for p in rows)
    sums = tuple(Shard(0) if p.is_shard(last) else Partial() if p.is_shard() else p for p in rows)

    def part(number: int, arg: Any) -> Any:
        if not isinstance(arg, DTensor):
            return arg
        place, gradient = channels, sums
        if number < rule.activations:
            place = gradient = rows
        elif number == rule.samples:
            place = gradient = samples
        # A redistribution would make the sums of the gradient at once.
        arg = arg if arg.placements == place else arg.redistribute(mesh, place)
        return arg.to_local(grad_placements=gradient)

    outputs = op(*[part(number, arg) for number, arg in enumerate(args)])
    shape, stride = args[0].shape, _contiguous_stride(args[0].shape)

    def whole(out: Tensor) -> Any:
        return DTensor.from_local(out, mesh, rows, run_check=False, shape=shape, stride=stride)

    return whole(outputs) if isinstance(outputs, Tensor) else tuple(map(whole, outputs))


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
