"""Blocks whose activations are computed again in the backward pass instead of being kept."""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import evakernels
from evaclip.model.norm import Stream
from evaclip.model.savings import Recompute


class ResidualBlock(nn.Module):
    """A transformer block in two parts: `mix(*attend(stream))`.

    What `attend` returns is kept by all policies but "block", so no product in front of it is needed twice.
    """

    kept_columns: int | None
    """Width of the matrix products in `mix` that "activations" keeps; None for all."""

    def forward(self, stream: Stream, *context: Any, keep_products: bool = False) -> Stream:
        """The stream behind the block; `context` as for `attend`. `keep_products` computes all but products again."""
        if keep_products:
            return _keeping_products(self, stream, *context)
        return self.mix(*self.attend(stream, *context))

    @abstractmethod
    def attend(self, stream: Stream, *context: Any) -> tuple[Tensor, Tensor]:
        """The rows of the stream that go on, and what is to be added to them: attention, up to its projection."""

    @abstractmethod
    def mix(self, x: Tensor, branch: Tensor) -> Stream:
        """Everything from the residual add of the attention branch to the end of the block."""


def run_block(block: ResidualBlock, recompute: Recompute, stream: Stream, *context: Any) -> Stream:
    """`block(stream, *context)`, keeping for the backward pass what `recompute` says."""
    # All policies call the block as a module: whoever hooks into that, as sharding does, must learn of it.
    if recompute == "block":
        return _kept(block, stream, *context)
    return block(stream, *context, keep_products=recompute == "activations")  # type: ignore[no-any-return]


def _keeping_products(block: ResidualBlock, stream: Stream, *context: Any) -> Stream:
    # Two regions, because a region that is computed again stops in front of its last product: so neither
    # the attention's output projection nor the MLP's runs a second time.
    x, branch = checkpoint(block.attend, stream, *context, use_reentrant=False, context_fn=_keep_attention)
    keep = partial(create_selective_checkpoint_contexts, partial(_is_kept_product, block.kept_columns))
    return _kept(block.mix, x, branch, context_fn=keep)


def _kept(step: Callable[..., Stream], *args: Any, **options: Any) -> Stream:
    """The stream behind a step that is computed again: added up, as each tensor between two steps is kept."""
    return Stream(checkpoint(lambda *args: step(*args).total(), *args, use_reentrant=False, **options))


def _is_kept_product(columns: int | None, _: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # The right factor is the last argument of both.
    product = op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
    keep = product and columns in (None, args[-1].shape[-1])
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


_keep_attention = partial(create_selective_checkpoint_contexts, evakernels.checkpoint_policy())
