"""Blocks whose activations are computed again in the backward pass instead of being kept."""

from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import evakernels
from evaclip.model.savings import Recompute


class ResidualBlock(nn.Module):
    """A transformer block in three parts: `mix(residual(x), attend(x))`.

    What `attend` returns is kept by all policies but "block", so no product in front of it is needed twice.
    """

    kept_columns: int | None
    """Width of the matrix products in `mix` that "activations" keeps; None for all."""

    def forward(self, x: Tensor, *context: Any, keep_products: bool = False) -> Tensor:
        """The block's output; `context` as for `attend`. `keep_products` computes all but products again."""
        if keep_products:
            return _keeping_products(self, x, *context)
        return self.mix(self.residual(x, *context), self.attend(x, *context))

    @abstractmethod
    def attend(self, x: Tensor, *context: Any) -> Tensor:
        """The attention branch, up to its output projection."""

    @abstractmethod
    def residual(self, x: Tensor, *context: Any) -> Tensor:
        """The rows of `x` that the branch is added to."""

    @abstractmethod
    def mix(self, x: Tensor, branch: Tensor) -> Tensor:
        """Everything from the residual add of the attention branch to the end of the block."""


def run_block(block: ResidualBlock, recompute: Recompute, x: Tensor, *context: Any) -> Tensor:
    """`block(x, *context)`, keeping for the backward pass what `recompute` says."""
    # All policies call the block as a module: whoever hooks into that, as sharding does, must learn of it.
    if recompute == "block":
        out: Tensor = checkpoint(block, x, *context, use_reentrant=False)
    else:
        out = block(x, *context, keep_products=recompute == "activations")
    return out


def _keeping_products(block: ResidualBlock, x: Tensor, *context: Any) -> Tensor:
    # Two regions, because a region that is computed again stops in front of its last product: so neither
    # the attention's output projection nor the MLP's runs a second time.
    branch = checkpoint(block.attend, x, *context, use_reentrant=False, context_fn=_keep_attention)
    keep = partial(create_selective_checkpoint_contexts, partial(_is_kept_product, block.kept_columns))
    out: Tensor = checkpoint(block.mix, block.residual(x, *context), branch, use_reentrant=False, context_fn=keep)
    return out


def _is_kept_product(columns: int | None, _: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # The right factor is the last argument of both.
    product = op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
    keep = product and columns in (None, args[-1].shape[-1])
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


_keep_attention = partial(create_selective_checkpoint_contexts, evakernels.checkpoint_policy())
