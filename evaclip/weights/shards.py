"""Whole tensors and models whose parameters are cut up over processes (DTensors)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def put(module: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """`module.load_state_dict(state)` for a state of whole tensors, of which each process takes its part."""
    own = module.state_dict()
    module.load_state_dict({n: part_of(t, own[n]) if n in own else t for n, t in state.items()}, strict=strict)


def is_sharded(module: nn.Module) -> bool:
    """Whether a parameter is cut up."""
    return any(is_cut(parameter) for parameter in module.parameters())


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor cut up like `like`; as it is if that isn't. Of a mapped file only the part is read."""
    if not is_cut(like):
        return whole
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(like, DTensor)
    mesh, local = like.device_mesh, whole
    for dim, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            parts = local.chunk(mesh.size(dim), placement.dim)
            index = mesh.get_local_rank(dim)
            local = parts[index] if index < len(parts) else local.narrow(placement.dim, 0, 0)
    part: DTensor = DTensor.from_local(
        local.to(like.device), mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return part


def first_row(tensor: Tensor) -> int:
    """Where the rows that this process holds of a tensor begin in the whole one; 0 for a tensor that isn't cut up.

    Raises:
        NotImplementedError: it is cut up otherwise than by rows, once.
    """
    if not is_cut(tensor):
        return 0
    from torch.distributed.tensor import Shard

    mesh, shards = tensor.device_mesh, [dim for dim, how in enumerate(tensor.placements) if isinstance(how, Shard)]
    if len(shards) > 1 or any(tensor.placements[dim] != Shard(0) for dim in shards):
        raise NotImplementedError(f"parts of tensors that are cut as {tensor.placements}; by rows is accepted")
    rows = tensor.shape[0]
    return max((min(rows, mesh.get_local_rank(dim) * -(-rows // mesh.size(dim))) for dim in shards), default=0)


def is_cut(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a part of one that lies in several processes, a DTensor."""
    # The import takes half a second, and nobody has a DTensor who hasn't made it.
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
