"""LayerNorm and RMSNorm: plain, with the residual add before the norm, and with the residual add after it."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends, triton
from ..autocast import widened, widens_norms
from ..reference import accumulation_dtype
from ..reference import layer_norm as reference
from . import _check
from ._dtensors import ShardingRule
from ._op import define, differentiable


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm over the last dimension (Ba, Kiros, Hinton 2016).

    Args:
        x: `[..., C]`, float64, float32, bfloat16 or float16.
        weight, bias: `[C]`, each in the dtype of `x`, of the result, or float32; or None.
        eps: added to the variance.
        out_dtype: dtype of the result, which is rounded once; None for the dtype of `x`. Compiled GPU kernels support
            pairs of float32 and a 16-bit dtype; the next backend runs other pairs.

    Returns:
        `[..., C]` in `out_dtype`. Statistics and sums are float32 (float64 for float64 input). Under CUDA autocast
        the default of `out_dtype` is float32, as in `torch.nn.functional.layer_norm`.

    Raises:
        TypeError: for a dtype that isn't accepted.
        ValueError: for shapes or devices that don't fit together.

    Examples:
        >>> x = torch.randn(2, 197, 768)
        >>> evakernels.layer_norm(x, torch.ones(768), torch.zeros(768)).shape
        torch.Size([2, 197, 768])
        >>> evakernels.layer_norm(x, out_dtype=torch.bfloat16).dtype
        torch.bfloat16
    """
    y: Tensor
    y, _ = _forward(x, weight, bias, eps, False, out_dtype)
    return y


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """RMSNorm over the last dimension (Zhang, Sennrich 2019): `layer_norm` without mean and bias.

    Arguments and errors are as for `layer_norm`. With `eps=None` eps is `torch.finfo(dtype).eps` of the sums' dtype,
    float32 or float64.

    Examples:
        >>> evakernels.rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]))
        tensor([0.8485, 2.2627])
    """
    y: Tensor
    y, _ = _forward(x, weight, None, eps, True, out_dtype)
    return y


def add_layer_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual add of one sub-layer and the norm of the next (pre-norm blocks) in one pass.

    Args:
        residual: `[B, ..., C]`.
        branch: output of the sub-layer, same shape.
        weight, bias: `[C]`, each in the dtype of `residual`, of `y`, or float32.
        layer_scale: `[C]`, factor of each channel of the branch (CaiT, Touvron et al. 2021).
        row_scale: `[B]`, factor of each sample of the branch, without gradient: 0 or 1/keep for stochastic depth
            (Huang et al. 2016).
        eps: added to the variance.
        out_dtype: dtype of `y`; None for the dtype of `residual`. Compiled kernels support a float32 residual with a
            16-bit branch and a `y` of the branch's dtype; the next backend runs other pairs.

    Returns:
        `(y, x)` with `x = residual + row_scale * layer_scale * branch`, in the dtype of `residual`, and
        `y = layer_norm(x)`, in `out_dtype`. Under CUDA autocast both are float32 unless `out_dtype` is given.

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
    both: tuple[Tensor, Tensor] = _forward(
        branch, weight, bias, eps, False, out_dtype, residual, layer_scale, row_scale, True
    )
    return both


def add_rms_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    *,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    eps: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` with RMSNorm; `eps` may be None, as in `rms_norm`.

    Examples:
        >>> y, x = evakernels.add_rms_norm(torch.ones(1, 2), torch.tensor([[2.0, 3.0]]))
        >>> x, y
        (tensor([[3., 4.]]), tensor([[0.8485, 1.1314]]))
    """
    both: tuple[Tensor, Tensor] = _forward(
        branch, weight, None, eps, True, out_dtype, residual, layer_scale, row_scale, True
    )
    return both


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

    Returns `residual + row_scale * layer_scale * layer_norm(branch)`, in the dtype of `residual`. Arguments and errors
    are as for `add_layer_norm`.

    Examples:
        >>> residual, branch = torch.randn(2, 2, 197, 768)
        >>> evakernels.layer_norm_add(residual, branch, torch.ones(768), torch.zeros(768), eps=1e-6).shape
        torch.Size([2, 197, 768])
    """
    x: Tensor
    x, _ = _forward(branch, weight, bias, eps, False, None, residual, layer_scale, row_scale)
    return x


def rms_norm_add(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    *,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """`layer_norm_add` with RMSNorm; `eps` may be None, as in `rms_norm`.

    Examples:
        >>> evakernels.rms_norm_add(torch.ones(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([[1.8485, 2.1314]])
    """
    x: Tensor
    x, _ = _forward(branch, weight, None, eps, True, None, residual, layer_scale, row_scale)
    return x


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_call(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    rms: bool,
    out_dtype: torch.dtype | None,
    *joined: Any,
) -> Any:
    if joined:
        return _check_joined(x, weight, bias, eps, rms, out_dtype, *joined)
    op = "rms_norm" if rms else "layer_norm"
    _check.floating(op, x=x)
    _check.out_dtype(op, out_dtype)
    if widens_norms(x):
        weight, bias = widened(weight, bias)
        if out_dtype is None and x.dtype != torch.float32:
            out_dtype = torch.float32
    weight, bias = _check_parameters(op, "x", x, weight, bias, out_dtype)
    _check.same_device(op, x=x, weight=weight, bias=bias)
    return x, weight, bias, _check_eps(op, eps, x, rms), rms, out_dtype


def _check_joined(
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    rms: bool,
    out_dtype: torch.dtype | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    add_first: bool = False,
) -> Any:
    norm = "rms_norm" if rms else "layer_norm"
    op = f"add_{norm}" if add_first else f"{norm}_add"
    _check.floating(op, residual=residual, branch=branch)
    _check.out_dtype(op, out_dtype)
    if widens_norms(residual):
        weight, bias = widened(weight, bias)
        residual = residual.float() if out_dtype is None else residual
    weight, bias = _check_parameters(op, "residual", residual, weight, bias, out_dtype)
    if residual.dim() < 2:
        raise ValueError(f"{op}: residual must have shape [B, ..., C], got {tuple(residual.shape)}")
    scales = {"layer_scale": layer_scale, "row_scale": row_scale}
    _check.floating_or_none(op, **scales)
    _check.shape(op, "branch", branch, tuple(residual.shape), "residual.shape")
    _check.shape(op, "layer_scale", layer_scale, (residual.shape[-1],), "[C]")
    _check.shape(op, "row_scale", row_scale, (residual.shape[0],), "[B]")
    _check.same_device(op, residual=residual, branch=branch, weight=weight, bias=bias, **scales)
    eps = _check_eps(op, eps, residual if add_first else branch, rms)
    return branch, weight, bias, eps, rms, out_dtype, residual, layer_scale, row_scale, *([True] if add_first else [])


def _check_eps(op: str, eps: float | None, x: Tensor, rms: bool) -> float:
    if eps is not None:
        return _check.eps(op, eps)
    if not rms:
        raise TypeError(f"{op}: eps must be {_check.EPS}, got None")
    return torch.finfo(accumulation_dtype(x)).eps


def _check_parameters(
    op: str, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype | None
) -> tuple[Any, ...]:
    if x.dim() == 0:
        raise ValueError(f"{op}: {name} must have shape [..., C], got ()")
    if bias is not None and weight is None:
        raise ValueError(f"{op}: bias must be None without weight, got {_check.kind(bias)}")
    _check.parameter_dtype(op, x, out_dtype, weight=weight, bias=bias)
    _check.shape(op, "weight", weight, (x.shape[-1],), "[C]")
    _check.shape(op, "bias", bias, (x.shape[-1],), "[C]")
    return _check.in_one_dtype(weight, bias)


# --- ops ------------------------------------------------------------------------------------------------------------


def _reasons(
    on_gpu: bool,
    *,
    x: Tensor | None = None,
    residual: Tensor | None = None,
    add_first: bool = False,
    out_dtype: torch.dtype | None = None,
    dy: Tensor | None = None,
    dtotal: Tensor | None = None,
    branch: Tensor | None = None,
    **_: Any,
) -> list[str]:
    """Why compiled kernels don't support the dtypes of branch, residual and `y`; without a residual, of `x` and `y`."""
    branch, residual, add_first = _first(branch, x), _first(residual, dtotal), add_first or dtotal is not None
    if branch is None:
        return []
    y = _first(out_dtype, _first(residual, branch).dtype) if dy is None else dy.dtype
    dtypes = branch.dtype, y if residual is None else residual.dtype
    if on_gpu:
        if dtypes[0] == dtypes[1] or torch.float32 in (dtypes[1:] if add_first else dtypes):
            return []
        accepted = "a float32 residual" if add_first else "one of both in float32"
        return [f"branch is {dtypes[0]} and residual {dtypes[1]}: GPU kernels take equal dtypes, or {accepted}"]
    if y == dtypes[1] or (add_first and dtypes == (y, torch.float32)):
        return []
    return [f"y is {y}; compiled kernels take {dtypes[1]}, or {dtypes[0]} next to a float32 residual added first"]


def _first(*given: Any) -> Any:
    """The first that isn't None, or None."""
    return next((each for each in given if each is not None), None)


_REASONS: dict[str, Any] = {
    "reasons": partial(_reasons, False),
    "gpu_reasons": partial(_reasons, True),
    "triton_reasons": lambda first, /, **_: triton.row_reasons(first),
}
_DEFAULTS = None, None, False
"""Defaults of layer_scale, row_scale and add_first; the dispatcher drops them at the end of a call."""


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    _, total, statistics = output
    x, weight, bias, *_ = inputs
    scales: tuple[Any, ...] = (*inputs[7:], *_DEFAULTS[max(0, len(inputs) - 7) :])
    layer_scale, row_scale, add_first = scales
    if add_first:
        # Only the gradient of layer_scale needs the branch's values; the others need its dtype.
        branch = x if ctx.needs_input_grad[7] else x.new_empty(0)
        ctx.save_for_backward(total, weight, statistics, None, layer_scale, row_scale, branch)
        return
    if total is not None:
        ctx.mark_non_differentiable(total, statistics)
    has_residual = len(inputs) > 6 and inputs[6] is not None
    ctx.save_for_backward(x, weight, statistics, *((bias, layer_scale, row_scale) if has_residual else ()))


def _gradient(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> Any:
    if dy is None and dtotal is None:
        return ()
    saved = ctx.saved_tensors  # once, as a checkpoint recomputes them at each access
    needed = ctx.needs_input_grad
    if len(saved) == 3:
        dx, _, dweight, dbias, _ = _backward(dy, *saved, (needed[1], needed[2], False, False))
        return dx, dweight, dbias
    x, weight, statistics, *joined = saved
    needs_x, needs_norm = needed[0], (needed[1], needed[2], needed[7])
    if len(joined) == 3:  # bias, layer_scale and row_scale of a residual that was added after
        if not (needs_x or any(needs_norm)):
            return None, None, None, None, None, None, dy
        dx, _, dweight, dbias, dlayer_scale = _backward(dy, x, weight, statistics, (*needs_norm, False), *joined)
        return dx, dweight, dbias, None, None, None, dy, dlayer_scale
    _, layer_scale, row_scale, branch = joined
    scaled = layer_scale is not None or row_scale is not None
    through_norm, dtotal = (torch.zeros_like(x) if gradient is None else gradient for gradient in (dy, dtotal))
    needs_grad, scales = (*needs_norm, needs_x and scaled), (None, layer_scale, row_scale)
    gradients = _backward(through_norm, x, weight, statistics, needs_grad, *scales, dtotal, branch)
    dresidual, dbranch, dweight, dbias, dlayer_scale = gradients
    if needs_x and not scaled:
        dbranch = dresidual.to(branch.dtype)
    # As in torch, the norm's parameters get None, not zeros, if y has no gradient.
    dweight, dbias = (None, None) if dy is None else (dweight, dbias)
    return dbranch, dweight, dbias, None, None, None, dresidual, dlayer_scale


_forward = define(
    reference.layer_norm_forward,
    check=_check_call,
    sharding=ShardingRule(("residual", "x"), samples="row_scale"),
    **_REASONS,
)
_backward = define(reference.layer_norm_backward, **_REASONS)
differentiable(_forward, _backward, setup_context=_setup, formula=_gradient, returned=2)

for _name in ("rms_norm", "add_layer_norm", "add_rms_norm", "layer_norm_add", "rms_norm_add"):
    backends.name_ops(_name, "layer_norm_forward")
