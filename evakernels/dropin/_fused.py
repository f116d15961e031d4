"""The fused steps that replaced forwards share, and the roles of the child modules that these steps read.

A fused step reads the parameters of a child module without calling it. It does so only while the child's class has the
expected role and the child has no hooks; otherwise the child is called, as in the untouched model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .._modes import is_observed
from ..autocast import is_on, matmul_inputs
from ..nn.swiglu import runs_as_one_op
from ..ops import add_layer_norm, add_rms_norm, layer_norm_add, swiglu, swiglu_mlp
from ._dispatch import dispatches_to
from ._swap import original_class

ROLES: dict[type, str] = {}
"""Role by class. Subclasses don't count."""

CHANGED = "_evakernels_changed"
"""Name of an attribute that `accelerate` sets on modules that behave differently from the role of their class."""


def role(module: Any) -> str | None:
    """The module's role, or None for a class without one, a module with hooks, its own forward or other behaviour."""
    name = class_role(type(module))
    return None if name is None or CHANGED in module.__dict__ or is_observed(module) else name


def class_role(cls: type) -> str | None:
    """The role of a class, or of the class that it replaces."""
    return ROLES.get(cls) or ROLES.get(original_class(cls) or cls)


def may_drop(module: Any) -> bool:
    """Whether a dropout or stochastic depth module may change its input; True for a module without such a role."""
    name = role(module)
    if name in ("dropout", "drop_path"):
        rate: float = module.p if name == "dropout" else module.drop_prob
        return module.training and rate > 0
    return name != "identity"


# --- norms ----------------------------------------------------------------------------------------------------------


def read_child_norm(norm: Any, x: Tensor) -> tuple[Tensor | None, Tensor | None, float] | None:
    """Weight, bias and eps of a child that is a norm of the last dimension, if the ops take them with `x`."""
    return read_norm(norm, x) if role(norm) in ("layer_norm", "rms_norm") else None


def read_norm(norm: Any, x: Tensor) -> tuple[Tensor | None, Tensor | None, float] | None:
    """Weight, bias and eps of a module that is known to be a norm, even if it has hooks."""
    if getattr(norm, "_fast_norm", False):  # timm's fast norm computes in autocast's dtype
        return None
    weight, bias = norm.weight, getattr(norm, "bias", None)
    eps: float | None = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    shape = getattr(norm, "normalized_shape", None)
    if eps is None or (shape is not None and len(shape) != 1) or (weight is None and bias is not None):
        return None
    if weight is not None and (weight.dtype not in (x.dtype, torch.float32) or weight.shape[0] != x.shape[-1]):
        return None
    return weight, bias, eps


def add_norm(
    residual: Tensor, branch: Tensor, norm: nn.Module, scale: Any = None, drop: Any = None, *, forced: bool
) -> tuple[Tensor, Tensor]:
    """`(norm(x), x)` with `x = residual + drop(scale(branch))`, in one pass where that is possible.

    `scale` is a layer-scale module, its parameter or None, `drop` a stochastic depth module or None.
    """
    factor = _factor(scale)
    op = "add_norm" if factor is None else "scaled_add_norm"
    if factor is not _UNREADABLE and dispatches_to(op, residual, forced=forced) and _fits(residual, branch, factor):
        parameters = read_child_norm(norm, residual)
        if parameters is not None and _is_readable(drop):
            rows = _row_scale(drop, branch, factor)
            weight, bias, eps = parameters
            if role(norm) == "rms_norm":
                return add_rms_norm(residual, branch, weight, layer_scale=factor, row_scale=rows, eps=eps)
            return add_layer_norm(residual, branch, weight, bias, layer_scale=factor, row_scale=rows, eps=eps)
    x = add(residual, branch, scale, drop)
    return norm(x), x


def norm_add(residual: Tensor, branch: Tensor, norm: nn.Module, drop: Any = None, *, forced: bool) -> Tensor:
    """`residual + drop(norm(branch))`."""
    if dispatches_to("norm_add", residual, forced=forced) and _fits(residual, branch, None):
        parameters = read_child_norm(norm, branch)
        if parameters is not None and _is_readable(drop) and role(norm) == "layer_norm":
            rows = _row_scale(drop, branch, None)
            weight, bias, eps = parameters
            return layer_norm_add(residual, branch, weight, bias, row_scale=rows, eps=eps)
    return add(residual, norm(branch), None, drop)


def add(residual: Tensor, branch: Tensor, scale: Any = None, drop: Any = None) -> Tensor:
    """`residual + drop(scale(branch))`."""
    factor = _factor(scale)
    # addcmul's backward needs another pass over memory.
    if isinstance(factor, Tensor) and not torch.is_grad_enabled() and (drop is None or not may_drop(drop)):
        return torch.addcmul(residual, branch, factor)
    if scale is not None:
        branch = scale(branch) if isinstance(scale, nn.Module) else scale * branch
    return residual + (branch if drop is None else drop(branch))


_UNREADABLE: Any = object()


def _factor(scale: Any) -> Any:
    """The factor of each channel, None without a layer scale, `_UNREADABLE` where the module has to be called."""
    if scale is None or isinstance(scale, Tensor):
        return scale
    name = role(scale)
    if name == "identity":
        return None
    return getattr(scale, "gamma", getattr(scale, "lambda1", _UNREADABLE)) if name == "layer_scale" else _UNREADABLE


def _fits(residual: Tensor, branch: Tensor, factor: Tensor | None) -> bool:
    """Whether torch's sum has the residual's shape and dtype, as the op's sum does."""
    dtype = residual.dtype
    if branch.shape != residual.shape or residual.dim() < 2:
        return False
    if residual.is_cuda and dtype != torch.float32 and is_on("cuda"):
        return False  # the op would return the sum in float32, too
    return dtype == torch.float32 or (branch.dtype == dtype and (factor is None or factor.dtype == dtype))


def _is_readable(drop: Any) -> bool:
    """Whether a stochastic depth module needs no call."""
    return drop is None or role(drop) in ("identity", "drop_path")


def _row_scale(drop: Any, branch: Tensor, factor: Tensor | None) -> Tensor | None:
    """The factor of each sample, drawn as the module draws it; None if nothing is dropped."""
    if drop is None or not may_drop(drop):
        return None
    dtype = branch.dtype if factor is None else torch.promote_types(branch.dtype, factor.dtype)
    return draw_rows(drop, branch, dtype).flatten()


def draw_rows(drop: Any, branch: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor of each sample, `[B, 1, ...]`, drawn as an active module draws it."""
    keep, shape = 1 - drop.drop_prob, (branch.shape[0],) + (1,) * (branch.dim() - 1)
    if hasattr(drop, "scale_by_keep"):
        rows = branch.new_empty(shape, dtype=dtype).bernoulli_(keep)
        if keep > 0 and drop.scale_by_keep:
            rows.div_(keep)
    else:
        rows = (torch.rand(shape, dtype=dtype, device=branch.device) + keep).floor().div(keep)
    return rows


# --- MLPs -----------------------------------------------------------------------------------------------------------


def apply_gate(gate: Tensor, up: Tensor, act: Any, drop: Any = None, norm: Any = None, *, forced: bool) -> Tensor:
    """`norm(drop(act(gate) * up))`."""
    is_silu = role(act) == "silu"
    is_normed = is_silu and role(norm) == "layer_norm" and (drop is None or not may_drop(drop))
    if is_normed and dispatches_to("swiglu_norm", gate, forced=forced):
        parameters = read_child_norm(norm, gate)
        if parameters is not None and parameters[0] is not None and gate.dtype == up.dtype:
            return swiglu(gate, up, *parameters)
    fused = is_silu and dispatches_to("swiglu", gate, forced=forced) and gate.dtype == up.dtype
    hidden = swiglu(gate, up) if fused else act(gate) * up
    hidden = hidden if drop is None else drop(hidden)
    return hidden if norm is None else norm(hidden)


def gated_mlp(
    x: Tensor,
    projections: tuple[Any, ...],
    last: Any,
    act: Any,
    drop: Any = None,
    norm: Any = None,
    *,
    gate_last: bool = False,
    forced: bool,
) -> Tensor | None:
    """`last(norm(drop(act(gate) * up)))` by one op; None if modules have to be called or the op has no advantage.

    `projections` are the layers of gate and up, or one layer of both, with the gate in its second half if `gate_last`.
    """
    is_normed = role(norm) == "layer_norm"
    op = "swiglu_norm" if is_normed else "swiglu"
    layers = *projections, last
    if not (
        role(act) == "silu"
        and (is_normed or norm is None or role(norm) == "identity")
        and (drop is None or not may_drop(drop))
        and all(_is_linear(layer) for layer in layers)
        and dispatches_to(op, x, after_linear=True, forced=forced)
        and runs_as_one_op(x, *(layer.weight for layer in layers))
    ):
        return None
    weights: Any
    biases: Any
    weights, biases = [layer.weight for layer in projections], [layer.bias for layer in projections]
    if len(projections) == 1:
        weights = list(weights[0].chunk(2))
        biases = [None, None] if biases[0] is None else list(biases[0].chunk(2))
    if gate_last:
        weights, biases = weights[::-1], biases[::-1]
    parameters: tuple[Any, ...] = ()
    if is_normed:
        (product,) = matmul_inputs(x.new_empty(0, weights[0].shape[0]))
        norm_parameters = read_child_norm(norm, product)
        if norm_parameters is None or norm_parameters[0] is None:
            return None
        parameters = norm_parameters
    arguments: list[Any] = [*weights, last.weight, *biases, last.bias, *parameters]
    return swiglu_mlp(x, *arguments)


def _is_linear(layer: Any) -> bool:
    return (original_class(type(layer)) or type(layer)) is nn.Linear and not is_observed(layer)
