"""Base of both towers: blocks with activation checkpointing, depth of parameters, freezing."""

import re
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import evakernels
from evaclip.model.config import Recompute, Savings
from evaclip.model.norm import Stream
from evakernels import Packing

_keep_attention = partial(create_selective_checkpoint_contexts, evakernels.checkpoint_policy())
_BLOCK = re.compile(r"\b(?:blocks|resblocks)\.(\d+)\.")


class ResidualBlock(nn.Module):
    """A transformer block in two parts: `mix(*attend(stream, *context, packing, pooled), packing)`.

    All policies but "block" save the outputs of `attend`, so no matmul before them runs twice.
    """

    kept_columns: int | None
    """Minimum width of the matmuls in `mix` that "activations" saves for backward; None for all."""

    def forward(self, stream: Stream, *context: Any, keep_products: bool = False) -> Stream:
        """The stream after the block; `context` as for `attend`. `keep_products` recomputes all but matmuls."""
        if keep_products:
            return _keeping_products(self, stream, *context)
        return self.mix(*self.attend(stream, *context), *context[-2:-1])

    @abstractmethod
    def attend(self, stream: Stream, *context: Any) -> tuple[Tensor, Tensor]:
        """Returns the rows of the residual stream to continue with, and the attention branch to add."""

    @abstractmethod
    def mix(self, x: Tensor, branch: Tensor, packing: Packing | None = None) -> Stream:
        """Everything from the residual add of the attention branch to the end of the block."""


def run_block(block: ResidualBlock, recompute: Recompute, stream: Stream, *context: Any) -> Stream:
    """`block(stream, *context)` with the activation checkpointing of `recompute`."""
    # All policies call the block as a module, for hooks such as those of sharding.
    if recompute == "block":
        return _checkpointed(block, stream, *context)
    return block(stream, *context, keep_products=recompute == "activations")  # type: ignore[no-any-return]


def _keeping_products(block: ResidualBlock, stream: Stream, *context: Any) -> Stream:
    # Two regions, because the recomputation of a region stops before its last matmul: so neither the attention's
    # output projection nor the MLP's runs twice.
    x, branch = checkpoint(block.attend, stream, *context, use_reentrant=False, context_fn=_keep_attention)
    keep = partial(create_selective_checkpoint_contexts, partial(_is_kept_product, block.kept_columns))
    return _checkpointed(block.mix, x, branch, *context[-2:-1], context_fn=keep)


def _checkpointed(step: Callable[..., Stream], *args: Any, **options: Any) -> Stream:
    """The stream after a step that is recomputed: its sum, as each tensor between two steps is saved."""
    return Stream(checkpoint(lambda *args: step(*args).total(), *args, use_reentrant=False, **options))


def _is_kept_product(columns: int | None, _: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # The right matrix is the last argument of both.
    width = args[-1].shape[-1] if op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default) else 0
    if op is torch.ops.evakernels.linear.default:  # in compiled code, with the weight [out, in]
        width = args[1].shape[0]
    # Compiled code has the MLP's matmuls in one op.
    keep = width >= (columns or 1) or op is torch.ops.evakernels.swiglu_mlp_forward.default
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class Tower(nn.Module):
    """A stack of transformer blocks between an embedding and a projection.

    Attributes:
        layers: number of blocks.
        savings: memory options; may be changed at any time.
    """

    embeddings: ClassVar[tuple[str, ...]]
    """First parts of the names of parameters before the first block."""

    def __init__(self, layers: int, savings: Savings) -> None:
        super().__init__()
        self.layers = layers
        self.savings = savings

    @property
    @abstractmethod
    def projection(self) -> str:
        """First part of the names of parameters after the last norm."""

    @property
    def num_layer_ids(self) -> int:
        """Number of values of `layer_id`: the embeddings, each block, and the rest."""
        return self.layers + 2

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning rates: 0 embeddings, i+1 block i, then the rest.

        Args:
            name: as in `named_parameters()` of this tower.
        """
        if name.split(".")[0] in self.embeddings:
            return 0
        block = _BLOCK.search(name)
        return int(block[1]) + 1 if block else self.layers + 1

    def lock(self, unlocked_groups: int = 0) -> None:
        """Freeze the tower except its last groups, from the output: the projection, the last block with the norm after
        it, each block before it, the embeddings.
        """
        for name, parameter in self.named_parameters():
            layer = self.layer_id(name)
            is_norm = layer > self.layers and not name.startswith(self.projection)
            parameter.requires_grad_(layer - is_norm >= self.num_layer_ids - unlocked_groups)

    def run_blocks(self, blocks: nn.ModuleList, x: Tensor, *context: Any, pooled_last: bool = True) -> Tensor:
        """`x` through all blocks; each is called as `block(stream, *context, pooled)`.

        The last of `context` is the packing of the rows, or None. `pooled` asks a block for the one token of each
        sample that the tower uses. It is true for the last block if `pooled_last` and the memory option are on.
        """
        recompute = self.savings.recompute if self.training else "none"
        stream = Stream(x)
        for index, block in enumerate(blocks):
            assert isinstance(block, ResidualBlock)
            pooled = pooled_last and self.savings.pooled_last_block and index == len(blocks) - 1
            stream = run_block(block, recompute, stream, *context, pooled)
        return stream.total()
