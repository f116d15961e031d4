"""Fully sharded training: torch's `fully_shard` around every block of the towers.

Each rank holds its rows of every parameter, gradient and moment, and a block is whole only while it computes.
`torch.distributed.fsdp` is imported where it is used: that takes a second, and most runs shard nothing.
"""

import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from evaclip.errors import UserError
from evaclip.model.norm import Stream
from evaclip.model.tower import ResidualBlock
from evaclip.train.config import SIXTEEN_BITS, ParallelConfig, Precision
from evaclip.train.distributed import World
from evaclip.weights import is_dtensor, shard_like

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}
_aten = torch.ops.aten
_RANDOM = (_aten.normal_.default, _aten.uniform_.default)


def shard(towers: Iterable[nn.Module], config: ParallelConfig, precision: Precision, world: World) -> None:
    """Shards every block of the towers, and the rest of each tower, as its own FSDP group.

    Parameters become DTensors under the same names; those outside the towers, such as logit_scale, stay whole. Position
    embeddings, class and mask tokens `[1, N, width]` stay whole, too: FSDP cuts the first dimension and pads it to the
    number of ranks. Under amp_bf16 and amp_fp16 parameters are used in 16 bits, gradients are summed in float32 and the
    towers return float32. Under bf16 and fp16 the float32 parameters of `cast_matrices` stay whole: FSDP needs one
    dtype.

    Args:
        towers: on the meta device, so that no rank ever holds one whole.

    Raises:
        UserError: `config.shard_size` doesn't divide the number of ranks.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    mesh = _mesh(config, world)
    # What the GPU copies must lie in pinned memory, which a machine without one doesn't have.
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if config.offload == "cpu" else OffloadPolicy()
    reshard = config.reshard_after_forward
    common: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard, "offload_policy": offload}
    dtype = AUTOCAST.get(precision)
    # A block's arguments are left alone: among them are the rotary tables, which must stay float32.
    in_block = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    around = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32 if dtype else None
    )
    for tower in towers:
        tokens = {parameter for parameter in tower.parameters() if _is_one_row(parameter)}
        narrow = {parameter for parameter in tower.parameters() if parameter.ndim < 2}
        common["ignored_params"] = tokens | narrow if precision in SIXTEEN_BITS else tokens
        if dtype is not None:
            _cast_in_forward(tower, tokens, dtype)
        for block in tower.modules():
            if isinstance(block, ResidualBlock):
                block.register_forward_hook(_without_views)
                fully_shard(block, mp_policy=in_block, **common)
        # Each tower is a root, so that either may be called alone.
        fully_shard(tower, mp_policy=around, **common)


def _without_views(block: nn.Module, args: Any, stream: Stream) -> Stream:
    """Returns no views: FSDP hooks into a block's output, and warns of views, as a write to them loses the hook."""
    branch = stream.branch
    return stream if branch is None else stream._replace(branch=torch.ops.aten._unsafe_view(branch, branch.shape))


def _is_one_row(parameter: Tensor) -> bool:
    return parameter.ndim > 1 and len(parameter) == 1


def _cast_in_forward(tower: nn.Module, parameters: set[nn.Parameter], dtype: torch.dtype) -> None:
    """Makes modules see these parameters in another dtype while they run, as FSDP does with sharded ones."""

    def cast(names: list[str], module: nn.Module, args: Any) -> None:
        # Python looks here before a module looks into its parameters.
        module.__dict__.update({name: module._parameters[name].to(dtype) for name in names})  # type: ignore[union-attr]

    def restore(names: list[str], module: nn.Module, args: Any, output: Any) -> None:
        for name in names:
            module.__dict__.pop(name, None)

    for module in tower.modules():
        if names := [name for name, parameter in module.named_parameters(recurse=False) if parameter in parameters]:
            module.register_forward_pre_hook(partial(cast, names))
            module.register_forward_hook(partial(restore, names), always_call=True)


def move_all_but_shards(model: nn.Module, device: torch.device) -> None:
    """Moves buffers and unsharded parameters to the device; for a model with shards in host memory."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
        for parameter in module.parameters(recurse=False):
            if not is_dtensor(parameter):
                parameter.data = parameter.data.to(device)


def synchronize_gradients(towers: Iterable[nn.Module], *, reduce: bool, is_last: bool) -> None:
    """Sets what the next backward pass does with gradients of shards.

    Args:
        reduce: reduce-scatter them over the ranks of a replica, instead of accumulating them locally.
        is_last: also sum the shards over replicas; until then each replica adds them up in float32.
    """
    for tower in _sharded(towers):
        tower.set_requires_gradient_sync(reduce)
        tower.set_requires_all_reduce(is_last)


def forget_gathered(model: nn.Module) -> None:
    """Drops parameters that are still gathered from a forward pass without a backward pass.

    Call it after writing to shards, or stale values would be used.
    """
    for module in _sharded(model.modules()):
        module.reshard()


def _sharded(modules: Iterable[nn.Module]) -> Iterator["FSDPModule"]:
    if "torch.distributed.fsdp" in sys.modules:  # without it, there are none
        from torch.distributed.fsdp import FSDPModule

        yield from (module for module in modules if isinstance(module, FSDPModule))


class WholeRandomNumbers(TorchDispatchMode):
    """Draws random initial values of sharded parameters for the whole tensor, of which each rank keeps its shard.

    A model then has equal initial values on any number of ranks, if their random states are equal.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _RANDOM or not is_dtensor(args[0]):
            return func(*args, **kwargs)
        target = args[0]
        whole = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        func(whole, *args[1:], **kwargs)
        target.copy_(shard_like(whole, target))
        return target


def _mesh(config: ParallelConfig, world: World) -> "DeviceMesh":
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if config.mode == "shard":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    size = config.shard_size
    assert size is not None
    if world.size % size:
        raise UserError(f"parallel.shard_size must divide the {world.size} ranks, got {size}")
    copies = [list(range(first, first + size)) for first in range(0, world.size, size)]
    same_rows = [list(ranks) for ranks in zip(*copies, strict=True)]
    limit = timedelta(minutes=config.timeout_minutes)
    # A mesh that made its groups itself would give them torch's own limit.
    groups = [dist.new_subgroups_by_enumeration(ranks, limit)[0] for ranks in (same_rows, copies)]
    return DeviceMesh.from_group(groups, world.device.type, copies, mesh_dim_names=("replicate", "shard"))
