"""The entrance of a vision tower: keep some of the patches, add their position embeddings, put the prefix
before them.

    out[b, :P] = prefix + pos_embed[:P]
    out[b, P + i] = patches[b, token_index[b, i]] + pos_embed[P + token_index[b, i]]

Keeping a random part of the patches is FLIP's way to cheaper training (Li et al. 2022). The indices of a
sample are distinct, so backward is a copy into zeros: no sum depends on an order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import accumulation_dtype


def token_dropout_forward(
    patches: Tensor, token_index: Tensor | None, prefix: Tensor | None, pos_embed: Tensor | None
) -> Tensor:
    batch, num_tokens, _ = patches.shape
    num_prefix = 0 if prefix is None else prefix.shape[0]
    tokens = patches
    if token_index is not None:
        rows = _flat_rows(token_index, num_tokens)
        tokens = patches.flatten(0, 1).index_select(0, rows).unflatten(0, token_index.shape)
    if pos_embed is not None:
        positions = pos_embed[num_prefix:]
        tokens = tokens + (positions if token_index is None else positions[token_index])
        prefix = None if prefix is None else prefix + pos_embed[:num_prefix]
    parts = [tokens] if prefix is None else [prefix.expand(batch, -1, -1), tokens]
    return torch.cat(parts, 1)


def token_dropout_backward(
    dout: Tensor, token_index: Tensor | None, num_prefix: int, num_tokens: int, needs_grad: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    # Where every patch is kept, their gradient is a part of dout, and none is needed here.
    needs_patches, needs_prefix, needs_pos_embed = needs_grad
    batch, _, channels = dout.shape
    dtokens = dprefix = dpos_embed = dout[:, num_prefix:]
    if token_index is not None and (needs_patches or needs_pos_embed):
        rows = _flat_rows(token_index, num_tokens)
        dtokens = dout.new_zeros(batch * num_tokens, channels).index_copy_(0, rows, dtokens.flatten(0, 1))
        dtokens = dtokens.view(batch, num_tokens, channels)
    if needs_prefix or needs_pos_embed:
        dprefix = _batch_sum(dout[:, :num_prefix])
    if needs_pos_embed:
        dpos_embed = torch.cat((dprefix, _batch_sum(dtokens)))
    gradients = zip((dtokens, dprefix, dpos_embed), needs_grad, strict=True)
    dpatches, dprefix, dpos_embed = (x if needed else dout.new_empty(0, dtype=torch.float32) for x, needed in gradients)
    return dpatches, dprefix, dpos_embed


def _flat_rows(token_index: Tensor, num_tokens: int) -> Tensor:
    """Row numbers in a [B * num_tokens, C] view."""
    first = torch.arange(token_index.shape[0], device=token_index.device).mul_(num_tokens)
    return (token_index + first.unsqueeze(1)).flatten()


def _batch_sum(x: Tensor) -> Tensor:
    return x.sum(0, dtype=accumulation_dtype(x)).to(x.dtype)
