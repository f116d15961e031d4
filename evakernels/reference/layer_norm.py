"""LayerNorm and RMSNorm, alone and joined with the residual connection around them.

    norm        y = norm(x)                                                       Ba et al. 2016; Zhang, Sennrich 2019
    add + norm  total = residual + row_scale * layer_scale * x;  y = norm(total)   pre-norm blocks
    norm + add  y = residual + row_scale * layer_scale * norm(x)                   post-norm blocks

`row_scale` [B] is the drop-path factor of each sample (0 or 1/keep), `layer_scale` [C] the factor of each channel. Sums
and statistics are float32 (float64 for float64 input). y is in `out_dtype`, by default the dtype of the residual or of
x; it is rounded once. `statistics` are mean and rstd, [2, B, ...], with `rms` rstd alone, [1, B, ...].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import accumulation_dtype


def layer_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    add_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, total (empty without `add_first`) and statistics."""
    stream = x if residual is None else residual
    if residual is not None and add_first:
        # The norm sees the sum before it is rounded: one rounding less than an add followed by a norm.
        x = _accumulate(residual) + _scaled(_accumulate(x), layer_scale, row_scale)
    normalized, mean, rstd = normalize(x, eps, rms)
    y = affine(normalized, weight, bias)
    if residual is not None and not add_first:
        y = _accumulate(residual) + _scaled(y, layer_scale, row_scale)
    statistics = torch.stack((rstd,) if rms else (mean, rstd))
    total = _result(x, stream.dtype) if add_first else rstd.new_empty(0)
    return _result(y, out_dtype or stream.dtype), total, statistics


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    needs_grad: Sequence[bool],
    bias: Tensor | None = None,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    dtotal: Tensor | None = None,
    branch: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, branch, weight, bias and layer_scale, empty where not needed.

    `needs_grad` is of weight, bias, layer_scale and branch. After a call with `add_first`, x is its total, `dtotal` the
    gradient that reaches total past the norm, and `branch` that call's x, with values if layer_scale needs a gradient.
    """
    needs_weight, needs_bias, needs_layer_scale, needs_branch = needs_grad
    rms, (*mean, rstd) = len(statistics) == 1, statistics
    moments = (rstd.new_empty(0) if rms else mean[0]), rstd
    of_norm, dbranch = (needs_weight, needs_bias), rstd.new_empty(0)
    if dtotal is None or branch is None:
        normed = affine(_standardize(x, *moments, rms), weight, bias) if needs_layer_scale else x
        of_scaled = True, needs_layer_scale
        dnormed, dlayer_scale = _scale_gradients(_accumulate(dy), normed, layer_scale, row_scale, of_scaled)
        dx, dweight, dbias = norm_gradients(dnormed, x, weight, *moments, rms, of_norm)
    else:
        through_norm, dweight, dbias = norm_gradients(dy, x, weight, *moments, rms, of_norm)
        dx = _accumulate(dtotal) + through_norm
        of_scaled = needs_branch, needs_layer_scale
        dbranch, dlayer_scale = _scale_gradients(dx, branch, layer_scale, row_scale, of_scaled)
        dbranch = _result(dbranch, branch.dtype) if needs_branch else dbranch
    return _result(dx, x.dtype), dbranch, dweight, dbias, dlayer_scale


def _accumulate(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x))


def _result(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous()


def normalize(x: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor, Tensor]:
    x = _accumulate(x)
    if rms:
        mean, centred = x.new_empty(0), x
    else:
        mean = x.mean(-1)
        # The mean of the deviations corrects the rounding of the mean, which would dominate a row of equal elements.
        mean = (mean + (x - mean.unsqueeze(-1)).mean(-1)).contiguous()
        centred = x - mean.unsqueeze(-1)
    rstd = torch.rsqrt(centred.square().mean(-1) + eps).contiguous()
    return centred * rstd.unsqueeze(-1), mean, rstd


def _standardize(x: Tensor, mean: Tensor, rstd: Tensor, rms: bool) -> Tensor:
    x = _accumulate(x)
    return (x if rms else x - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)


def affine(normalized: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        normalized = normalized * weight
    return normalized if bias is None else normalized + bias


def norm_gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, rms: bool, needs_grad: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in accumulation precision, dweight and dbias in theirs (empty where there is none or it isn't needed)."""
    needs_weight, needs_bias = needs_grad
    dy, normalized = _accumulate(dy), _standardize(x, mean, rstd, rms)
    dnormalized = dy if weight is None else dy * weight
    dx = dnormalized - normalized * (dnormalized * normalized).mean(-1, keepdim=True)
    if not rms:
        dx = dx - dnormalized.mean(-1, keepdim=True)
    dweight, dbias = rstd.new_empty(0), rstd.new_empty(0)
    if weight is not None and needs_weight:
        dweight = _row_sum(dy * normalized).to(weight.dtype)
    if weight is not None and needs_bias:
        dbias = _row_sum(dy).to(weight.dtype)
    return dx * rstd.unsqueeze(-1), dweight, dbias


def _scaled(branch: Tensor, layer_scale: Tensor | None, row_scale: Tensor | None) -> Tensor:
    if layer_scale is not None:
        branch = branch * layer_scale
    return branch if row_scale is None else branch * _per_sample(row_scale, branch)


def _scale_gradients(
    dscaled: Tensor, branch: Tensor, layer_scale: Tensor | None, row_scale: Tensor | None, needs_grad: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of the scaled branch for the branch and for layer_scale (empty where none is needed)."""
    dbranch, dlayer_scale = dscaled.new_empty(0), dscaled.new_empty(0)
    needs_branch, needs_layer_scale = needs_grad
    if row_scale is not None and any(needs_grad):
        dscaled = dscaled * _per_sample(row_scale, dscaled)
    if layer_scale is not None and needs_layer_scale:
        dlayer_scale = _row_sum(dscaled * _accumulate(branch)).to(layer_scale.dtype)
    if needs_branch:
        dbranch = dscaled if layer_scale is None else dscaled * layer_scale
    return dbranch, dlayer_scale


def _row_sum(x: Tensor) -> Tensor:
    return x.unsqueeze(0).flatten(0, -2).sum(0)


def _per_sample(row_scale: Tensor, like: Tensor) -> Tensor:
    return row_scale.view(-1, *[1] * (like.dim() - 1))
