"""LayerNorm and RMSNorm: plain, with the residual add before the norm, and with the residual add after it."""

from typing import Any

import torch
from torch import Tensor

from evakernels import backends
from evakernels.ops import _check
from evakernels.ops._autocast import norm_inputs
from evakernels.ops._register import define, differentiable, optional_gradient
from evakernels.reference import layer_norm as reference
from evakernels.reference._numerics import accumulation_dtype


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension (Ba, Kiros, Hinton 2016).

    Args:
        x: `[..., C]`, float64, float32, bfloat16 or float16.
        weight, bias: `[C]`, in the dtype of `x` or float32; None for none.
        eps: added to the variance; by default as in torch. EVA's norms have 1e-6.

    Returns:
        `[..., C]` in the dtype of `x`. Statistics and sums are float32 (float64 for float64 input). Under CUDA autocast
        the result is float32, as that of `torch.nn.functional.layer_norm`.

    Raises:
        TypeError: for a dtype that isn't accepted.
        ValueError: for shapes or devices that don't fit together.

    Examples:
        >>> x = torch.randn(2, 197, 768)
        >>> evakernels.layer_norm(x, torch.ones(768), torch.zeros(768)).shape
        torch.Size([2, 197, 768])
    """
    return _plain("layer_norm", x, weight, bias, eps, rms=False)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """RMSNorm over the last dimension (Zhang, Sennrich 2019): `layer_norm` without mean and bias.

    Takes and raises what `layer_norm` does, but `eps` may be None, and is by default, as in
    `torch.nn.functional.rms_norm`: `torch.finfo` of the dtype of the sums says it then, float32 or float64.

    Examples:
        >>> evakernels.rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]))
        tensor([0.8485, 2.2627])
    """
    return _plain("rms_norm", x, weight, None, eps, rms=True)


def add_layer_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The residual add of one sub-layer and the norm of the next (pre-norm blocks) in one pass.

    Args:
        residual: `[B, ..., C]`.
        branch: the output of the sub-layer, same shape.
        weight, bias: `[C]`, of the norm.
        layer_scale: `[C]`, factor of each channel of the branch (CaiT, Touvron et al. 2021).
        row_scale: `[B]`, factor of each sample of the branch: 0 or 1/keep for stochastic depth (Huang et al. 2016).
            It gets no gradient.
        eps: added to the variance.

    Returns:
        `(y, x)` with `x = residual + row_scale * layer_scale * branch` and `y = layer_norm(x)`, both in the dtype of
        `residual`.

    Raises:
        TypeError: for a dtype that isn't accepted.
        ValueError: for shapes or devices that don't fit together.

    Examples:
        >>> residual, branch = torch.randn(2, 2, 197, 768)
        >>> keep = torch.tensor([0.0, 2.0])  # stochastic depth: the first sample's branch is dropped
        >>> y, x = evakernels.add_layer_norm(residual, branch, torch.ones(768), torch.zeros(768), row_scale=keep)
        >>> torch.equal(x[0], residual[0])
        True
    """
    return _add_norm("add_layer_norm", residual, branch, weight, bias, layer_scale, row_scale, eps, rms=False)


def add_rms_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    *,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` with RMSNorm, whose `eps` may be None, as that of `rms_norm`.

    Examples:
        >>> y, x = evakernels.add_rms_norm(torch.ones(1, 2), torch.tensor([[2.0, 3.0]]))
        >>> x, y
        (tensor([[3., 4.]]), tensor([[0.8485, 1.1314]]))
    """
    return _add_norm("add_rms_norm", residual, branch, weight, None, layer_scale, row_scale, eps, rms=True)


def layer_norm_add(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The norm of a sub-layer's output and its residual add (post-norm blocks, as in EVA-CLIP E and 18B) in one pass.

    Takes and raises what `add_layer_norm` does, and returns `residual + row_scale * layer_scale * layer_norm(branch)`
    in the dtype of `residual`.

    Examples:
        >>> residual, branch = torch.randn(2, 2, 197, 768)
        >>> evakernels.layer_norm_add(residual, branch, torch.ones(768), torch.zeros(768), eps=1e-6).shape
        torch.Size([2, 197, 768])
    """
    return _norm_add("layer_norm_add", residual, branch, weight, bias, layer_scale, row_scale, eps, rms=False)


def rms_norm_add(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    *,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """`layer_norm_add` with RMSNorm, whose `eps` may be None, as that of `rms_norm`.

    Examples:
        >>> evakernels.rms_norm_add(torch.ones(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([[1.8485, 2.1314]])
    """
    return _norm_add("rms_norm_add", residual, branch, weight, None, layer_scale, row_scale, eps, rms=True)


def _plain(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, *, rms: bool) -> Tensor:
    _check.floating(op, x=x)
    x, weight, bias = norm_inputs(x, weight, bias)
    _check_norm(op, "x", x, weight, bias)
    _check.same_device(op, x=x, weight=weight, bias=bias)
    eps = _checked_eps(op, eps, x, rms)
    y: Tensor = _forward(x, weight, bias, eps, rms)[0]
    return y


def _add_norm(
    op: str,
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    eps: float | None,
    *,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    _check.floating(op, residual=residual, branch=branch)
    residual, weight, bias = norm_inputs(residual, weight, bias)
    _check_norm(op, "residual", residual, weight, bias)
    _check_residual(op, residual, branch, layer_scale, row_scale)
    scales = {"layer_scale": layer_scale, "row_scale": row_scale}
    _check.same_device(op, residual=residual, branch=branch, weight=weight, bias=bias, **scales)
    eps = _checked_eps(op, eps, residual, rms)
    y, x, _, _ = _add_forward(residual, branch, weight, bias, layer_scale, row_scale, eps, rms)
    return y, x


def _norm_add(
    op: str,
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    eps: float | None,
    *,
    rms: bool,
) -> Tensor:
    _check.floating(op, residual=residual, branch=branch)
    residual, weight, bias = norm_inputs(residual, weight, bias)
    _check_norm(op, "residual", residual, weight, bias)
    _check_residual(op, residual, branch, layer_scale, row_scale)
    scales = {"layer_scale": layer_scale, "row_scale": row_scale}
    _check.same_device(op, residual=residual, branch=branch, weight=weight, bias=bias, **scales)
    eps = _checked_eps(op, eps, residual, rms)
    x: Tensor = _norm_add_forward(residual, branch, weight, bias, layer_scale, row_scale, eps, rms)[0]
    return x


def _checked_eps(op: str, eps: float | None, x: Tensor, rms: bool) -> float:
    if eps is not None:
        return _check.eps(op, eps)
    if not rms:
        raise TypeError(f"{op}: eps is None; accepted: {_check.EPS}")
    return torch.finfo(accumulation_dtype(x)).eps


def _check_norm(op: str, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if x.dim() == 0:
        raise ValueError(f"{op}: {name} is a scalar; expected [..., C]")
    if bias is not None and weight is None:
        raise ValueError(f"{op}: bias without weight; give both or neither")
    _check.parameter_dtype(op, x, weight=weight, bias=bias)
    _check.shape(op, "weight", weight, (x.shape[-1],), "[C]")
    _check.shape(op, "bias", bias, (x.shape[-1],), "[C]")


def _check_residual(
    op: str, residual: Tensor, branch: Tensor, layer_scale: Tensor | None, row_scale: Tensor | None
) -> None:
    if residual.dim() < 2:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}; expected [B, ..., C]")
    _check.floating_or_none(op, layer_scale=layer_scale, row_scale=row_scale)
    _check.shape(op, "branch", branch, tuple(residual.shape), "the shape of residual")
    _check.shape(op, "layer_scale", layer_scale, (residual.shape[-1],), "[C]")
    _check.shape(op, "row_scale", row_scale, (residual.shape[0],), "[B]")


# --- ops ------------------------------------------------------------------------------------------------------------


def _statistics(x: Tensor, rms: bool) -> tuple[Tensor, Tensor]:
    """Empty mean and rstd: one value a row, and no mean at all for RMSNorm."""
    rstd = x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x))
    return rstd.new_empty(0) if rms else torch.empty_like(rstd), rstd


def _parameter_gradient(x: Tensor, weight: Tensor | None, present: bool) -> Tensor:
    dtype = x.dtype if weight is None else weight.dtype
    return x.new_empty(x.shape[-1] if present else 0, dtype=dtype)


def _forward_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> Any:
    return torch.empty_like(x, memory_format=torch.contiguous_format), *_statistics(x, rms)


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool, rms: bool
) -> Any:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, _parameter_gradient(x, weight, weight is not None), _parameter_gradient(x, weight, has_bias)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, ctx.rms = inputs
    _, mean, rstd = output
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)


def _gradient(ctx: Any, dy: Tensor, *_: Tensor) -> Any:
    x, weight, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = _backward(dy, x, weight, mean, rstd, ctx.has_bias, ctx.rms)
    return dx, optional_gradient(dweight, weight is not None), optional_gradient(dbias, ctx.has_bias), None, None


_forward = define(
    "layer_norm_forward",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, bool rms) -> (Tensor y, Tensor mean, Tensor rstd)",
    reference=reference.layer_norm_forward,
    fake=_forward_fake,
)
_backward = define(
    "layer_norm_backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool has_bias, bool rms)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    reference=reference.layer_norm_backward,
    fake=_backward_fake,
)
differentiable(_forward, _backward, setup_context=_setup, formula=_gradient)


def _dtype_reasons(branch: int) -> backends.Reasons:
    """What the kernels for GPUs can't serve: a 16-bit residual with another dtype in the argument number `branch`."""

    def reasons(first: Tensor, *rest: Any) -> list[str]:
        residual, other = first.dtype, rest[branch - 1].dtype if len(rest) >= branch else first.dtype
        if residual in (other, torch.float32):
            return []
        return [f"branch is {other} beside {residual}: kernels for GPUs take the same dtype, or any beside float32"]

    return reasons


def _add_forward_fake(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    eps: float,
    rms: bool,
) -> Any:
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y), *_statistics(residual, rms)


def _add_backward_fake(
    dy: Tensor,
    dx: Tensor,
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
    rms: bool,
) -> Any:
    scaled = layer_scale is not None or row_scale is not None
    return (
        torch.empty_like(x),
        torch.empty_like(x, dtype=branch.dtype) if scaled else rstd.new_empty(0),
        _parameter_gradient(x, weight, weight is not None),
        _parameter_gradient(x, weight, has_bias),
        rstd.new_empty(0) if layer_scale is None else torch.empty_like(layer_scale),
    )


def _add_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, weight, bias, layer_scale, row_scale, _, ctx.rms = inputs
    _, x, mean, rstd = output
    ctx.has_bias, ctx.branch_dtype = bias is not None, branch.dtype
    ctx.mark_non_differentiable(mean, rstd)
    # The branch is needed for the gradient of layer_scale only; otherwise its dtype is all that is kept.
    kept = branch if layer_scale is not None else branch.new_empty(0)
    ctx.save_for_backward(x, kept, weight, layer_scale, row_scale, mean, rstd)


def _add_gradient(ctx: Any, dy: Tensor, dx: Tensor, *_: Tensor) -> Any:
    x, branch, weight, layer_scale, row_scale, mean, rstd = ctx.saved_tensors
    dresidual, dbranch, dweight, dbias, dlayer_scale = _add_backward(
        dy, dx, x, branch, weight, layer_scale, row_scale, mean, rstd, ctx.has_bias, ctx.rms
    )
    unscaled = layer_scale is None and row_scale is None
    return (
        dresidual,
        dresidual.to(ctx.branch_dtype) if unscaled else dbranch,
        optional_gradient(dweight, weight is not None),
        optional_gradient(dbias, ctx.has_bias),
        optional_gradient(dlayer_scale, layer_scale is not None),
        None,
        None,
        None,
    )


_add_forward = define(
    "add_layer_norm_forward",
    "(Tensor residual, Tensor branch, Tensor? weight, Tensor? bias, Tensor? layer_scale, Tensor? row_scale,"
    " float eps, bool rms) -> (Tensor y, Tensor x, Tensor mean, Tensor rstd)",
    reference=reference.add_layer_norm_forward,
    fake=_add_forward_fake,
    gpu_reasons=_dtype_reasons(branch=1),
)
_add_backward = define(
    "add_layer_norm_backward",
    "(Tensor dy, Tensor dx, Tensor x, Tensor branch, Tensor? weight, Tensor? layer_scale, Tensor? row_scale,"
    " Tensor mean, Tensor rstd, bool has_bias, bool rms)"
    " -> (Tensor dresidual, Tensor dbranch, Tensor dweight, Tensor dbias, Tensor dlayer_scale)",
    reference=reference.add_layer_norm_backward,
    fake=_add_backward_fake,
    gpu_reasons=_dtype_reasons(branch=3),
)
differentiable(_add_forward, _add_backward, setup_context=_add_setup, formula=_add_gradient)


def _norm_add_forward_fake(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    eps: float,
    rms: bool,
) -> Any:
    return torch.empty_like(residual, memory_format=torch.contiguous_format), *_statistics(branch, rms)


def _norm_add_backward_fake(
    dx: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
) -> Any:
    return (
        torch.empty_like(branch, memory_format=torch.contiguous_format),
        _parameter_gradient(branch, weight, weight is not None),
        _parameter_gradient(branch, weight, bias is not None),
        rstd.new_empty(0) if layer_scale is None else torch.empty_like(layer_scale),
    )


def _norm_add_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, weight, bias, layer_scale, row_scale, _, ctx.rms = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(branch, weight, bias, layer_scale, row_scale, mean, rstd)


def _norm_add_gradient(ctx: Any, dx: Tensor, *_: Tensor) -> Any:
    branch, weight, bias, layer_scale, row_scale, mean, rstd = ctx.saved_tensors
    dbranch, dweight, dbias, dlayer_scale = _norm_add_backward(
        dx, branch, weight, bias, layer_scale, row_scale, mean, rstd, ctx.rms
    )
    return (
        dx,
        dbranch,
        optional_gradient(dweight, weight is not None),
        optional_gradient(dbias, bias is not None),
        optional_gradient(dlayer_scale, layer_scale is not None),
        None,
        None,
        None,
    )


_norm_add_forward = define(
    "layer_norm_add_forward",
    "(Tensor residual, Tensor branch, Tensor? weight, Tensor? bias, Tensor? layer_scale, Tensor? row_scale,"
    " float eps, bool rms) -> (Tensor x, Tensor mean, Tensor rstd)",
    reference=reference.layer_norm_add_forward,
    fake=_norm_add_forward_fake,
    gpu_reasons=_dtype_reasons(branch=1),
)
_norm_add_backward = define(
    "layer_norm_add_backward",
    "(Tensor dx, Tensor branch, Tensor? weight, Tensor? bias, Tensor? layer_scale, Tensor? row_scale, Tensor mean,"
    " Tensor rstd, bool rms) -> (Tensor dbranch, Tensor dweight, Tensor dbias, Tensor dlayer_scale)",
    reference=reference.layer_norm_add_backward,
    fake=_norm_add_backward_fake,
    gpu_reasons=_dtype_reasons(branch=1),
)
differentiable(_norm_add_forward, _norm_add_backward, setup_context=_norm_add_setup, formula=_norm_add_gradient)

backends.name_ops("rms_norm", "layer_norm_forward")
backends.name_ops("add_rms_norm", "add_layer_norm_forward")
backends.name_ops("rms_norm_add", "layer_norm_add_forward")
