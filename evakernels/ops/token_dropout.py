"""Token dropout: sampling of the kept patches, and their gather."""

from typing import Any

import torch
from torch import Tensor

from ..reference import token_dropout as reference
from . import _check
from ._check import distinct_tokens, token_range
from ._op import define, differentiable


def token_dropout(
    patches: Tensor, token_index: Tensor | None = None, *, prefix: Tensor | None = None, pos_embed: Tensor | None = None
) -> Tensor:
    """Keeps the patches that `token_index` names, adds their position embeddings and prepends the prefix.

    Dropping a random part of the patches is FLIP's way to cheaper training (Li et al. 2022).

    Args:
        patches: `[B, N, C]`.
        token_index: int64 `[B, K]`, distinct within a row, in the order of the output. None keeps all (K = N).
            `sample_token_index` draws it; `rope_attention` takes it to rotate by the original positions.
        prefix: `[P, C]`, class token and registers, put before the patches of every sample.
        pos_embed: `[P + N, C]`, added to the tokens, the prefix's rows first.

    Returns:
        `[B, P + K, C]`, contiguous, in the widest dtype of the inputs.

    Raises:
        TypeError: for a dtype that isn't accepted.
        ValueError: for shapes or devices that don't fit together.
        IndexError: on a CPU, for a `token_index` that is out of range or repeats a token. On GPUs the CUDA kernels
            cause a CUDA error. Triton's return NaN for an index out of range; there and in the reference a repeated
            token gets the gradient of one of its copies.

    Examples:
        >>> index = evakernels.sample_token_index(2, 196, 98)
        >>> evakernels.token_dropout(torch.randn(2, 196, 768), index, prefix=torch.randn(1, 768)).shape
        torch.Size([2, 99, 768])
    """
    out: Tensor = _forward(patches, token_index, prefix, pos_embed)
    return out


def sample_token_index(
    batch: int,
    num_tokens: int,
    num_keep: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws `num_keep` of `num_tokens` tokens for each sample, uniformly and independently.

    Args:
        batch: number of samples.
        num_tokens, num_keep: 1 <= num_keep <= num_tokens.
        generator: None for the default generator of the device.
        device: device of the result; None for the generator's.

    Returns:
        int64 `[batch, num_keep]`, ascending in each row, without synchronisation.

    Raises:
        ValueError: for a `num_keep` outside 1 to `num_tokens`.

    Examples:
        >>> evakernels.sample_token_index(2, 196, 98, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 98])
    """
    if not 1 <= num_keep <= num_tokens:
        raise ValueError(f"sample_token_index: num_keep must be 1 to num_tokens = {num_tokens}, got {num_keep}")
    if device is None and generator is not None:
        device = generator.device
    keys = torch.rand(batch, num_tokens, generator=generator, device=device)
    return keys.topk(num_keep, sorted=False).indices.sort().values


def _check_call(patches: Tensor, token_index: Tensor | None, prefix: Tensor | None, pos_embed: Tensor | None) -> Any:
    op = "token_dropout"
    _check.floating(op, patches=patches)
    _check.floating_or_none(op, prefix=prefix, pos_embed=pos_embed)
    if token_index is not None:
        _check.dtypes(op, (torch.int64,), token_index=token_index)
    if patches.dim() != 3:
        raise ValueError(f"{op}: patches must have shape [B, N, C], got {tuple(patches.shape)}")
    batch, num_tokens, channels = patches.shape
    _check.same_device(op, patches=patches, token_index=token_index, prefix=prefix, pos_embed=pos_embed)
    if token_index is not None:
        num_keep = token_index.shape[-1] if token_index.dim() else 0
        _check.shape(op, "token_index", token_index, (batch, num_keep), "[B, K]")
    num_prefix = 0
    if prefix is not None:
        num_prefix = prefix.shape[0] if prefix.dim() else 0
        _check.shape(op, "prefix", prefix, (num_prefix, channels), "[P, C]")
    _check.shape(op, "pos_embed", pos_embed, (num_prefix + num_tokens, channels), "[P + N, C]")
    return patches, token_index, prefix, pos_embed


# --- ops ------------------------------------------------------------------------------------------------------------


def _check_values(patches: Tensor, token_index: Tensor | None, *_: Tensor | None) -> None:
    if token_index is not None:
        token_range("token_dropout", token_index, patches.shape[1])
        distinct_tokens("token_dropout", token_index, patches.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    patches, token_index, prefix, pos_embed = inputs
    ctx.num_tokens = patches.shape[1]
    ctx.num_prefix = 0 if prefix is None else prefix.shape[0]
    ctx.dtypes = [None if t is None else t.dtype for t in (patches, prefix, pos_embed)]
    ctx.save_for_backward(token_index)


def _gradient(ctx: Any, dout: Tensor) -> Any:
    (token_index,) = ctx.saved_tensors
    needs_patches, _, needs_prefix, needs_pos_embed, *_ = ctx.needs_input_grad
    needs_grad = needs_patches and token_index is not None, needs_prefix, needs_pos_embed
    gradients = dout[:, :0], dout[:, :0], dout[:, :0]
    if any(needs_grad):
        gradients = _backward(dout, token_index, ctx.num_prefix, ctx.num_tokens, needs_grad)
    dpatches, dprefix, dpos_embed = gradients
    if token_index is None:
        dpatches = dout[:, ctx.num_prefix :]
    return dpatches, None, dprefix, dpos_embed


_forward = define(reference.token_dropout_forward, check=_check_call, check_values=_check_values)
_backward = define(reference.token_dropout_backward)
differentiable(_forward, _backward, setup_context=_setup, formula=_gradient)
