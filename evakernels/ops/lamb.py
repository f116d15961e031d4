"""LAMB in two calls for all tensors of a model, whatever their groups; between them norms may be reduced."""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evakernels.ops import _check
from evakernels.ops._register import define
from evakernels.reference import lamb as reference
from evakernels.reference._numerics import accumulation_dtype

VARIANTS = ("deepspeed", "nvlamb")
Tensors = Sequence[Tensor]


def lamb_update(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    weight_decays: Sequence[float],
    *,
    betas: tuple[float, float],
    eps: float,
    variant: str = "deepspeed",
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """The first phase of LAMB (You et al. 2020): moments and step counts, in place, and the norms it needs.

    Args:
        params, grads: n tensors, any shapes, dense; float64, float32, bfloat16 or float16, also mixed.
        exp_avgs, exp_avg_sqs: the moments, in the shapes of `params` and any of these dtypes. Written.
        steps: n different 0-D float32 tensors, the number of steps made; counted up. Written.
        weight_decays: n numbers.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the root of the second moment.
        variant: `"deepspeed"`: bias correction multiplies the whole step, the trust ratio is clipped to
            [0.01, 10] and applies to every tensor. `"nvlamb"`: the paper's and apex's form, with corrected
            moments and a trust ratio that is not clipped and applies to tensors with weight decay only.
        grad_scale: one element; the gradients are divided by it (`grads` itself stays as it is).
        found_inf: one element; above 0 nothing is written. It is read on the device, as is grad_scale.

    Returns:
        `[n, 2]` squared norms of each parameter and of its direction, for `lamb_apply`, float32 (float64 when
        a parameter is float64). Where each rank holds a shard of every tensor, sum them over the ranks.

    Raises:
        TypeError: for a dtype or layout that isn't accepted. ValueError: for lists, shapes or devices that
            don't fit together, or an unknown variant.
    """
    op = "lamb_update"
    _check_tensors(op, params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    _check_options(op, params, steps, {"weight_decays": weight_decays}, variant)
    _check_flags(op, params[0], grad_scale=grad_scale, found_inf=found_inf)
    squared_norms: Tensor = _update(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        weight_decays,
        *betas,
        eps,
        variant == "nvlamb",
        grad_scale,
        found_inf,
    )
    return squared_norms


def lamb_apply(
    params: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    squared_norms: Tensor,
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    *,
    betas: tuple[float, float],
    eps: float,
    variant: str = "deepspeed",
    found_inf: Tensor | None = None,
) -> None:
    """The second phase of LAMB: writes `params`, from what `lamb_update` left and returned.

    Takes and raises what `lamb_update` does, and `lrs`, n learning rates. Only `params` are written.
    """
    op = "lamb_apply"
    _check_tensors(op, params, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    _check_options(op, params, steps, {"lrs": lrs, "weight_decays": weight_decays}, variant)
    _check.floating(op, squared_norms=squared_norms)
    _check.shape(op, "squared_norms", squared_norms, (len(params), 2), "[n, 2]")
    _check_flags(op, params[0], found_inf=found_inf)
    _apply(
        params,
        exp_avgs,
        exp_avg_sqs,
        steps,
        squared_norms,
        lrs,
        weight_decays,
        *betas,
        eps,
        variant == "nvlamb",
        found_inf,
    )


def check_variant(op: str, variant: str) -> None:
    """`variant` is one of `VARIANTS`."""
    if variant not in VARIANTS:
        near = difflib.get_close_matches(variant, VARIANTS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{op}: variant is {variant!r}; accepted: {', '.join(map(repr, VARIANTS))}{hint}")


def _check_tensors(op: str, params: Tensors, **lists: Tensors) -> None:
    if not params:
        raise ValueError(f"{op}: params is empty; expected at least one tensor")
    for name, tensors in {"params": params, **lists}.items():
        _check_length(op, name, tensors, params)
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if not _fits(tensor, param, params[0].device):
                _refuse(op, f"{name}[{i}]", tensor, params, i)


def _fits(tensor: Tensor, param: Tensor, device: torch.device) -> bool:
    # For lists of small tensors the checks are most of a step's time, so the messages are made only when needed.
    return (
        tensor.layout == torch.strided
        and tensor.dtype in _check.FLOATS
        and tensor.device == device
        and tensor.shape == param.shape
    )


def _refuse(op: str, label: str, tensor: Tensor, params: Tensors, i: int) -> None:
    """Raises with the first reason why `_fits` says no."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {label} is {tensor.layout}; accepted: dense tensors")
    _check.floating(op, **{label: tensor})
    _check.same_device(op, **{"params[0]": params[0], label: tensor})
    _check.shape(op, label, tensor, tuple(params[i].shape), f"the shape of params[{i}]")


def _check_options(op: str, params: Tensors, steps: Tensors, numbers: dict[str, Sequence[float]], variant: str) -> None:
    check_variant(op, variant)
    _check_length(op, "steps", steps, params)
    for name, values in numbers.items():
        _check_length(op, name, values, params)
    for i, step in enumerate(steps):
        if step.dtype != torch.float32 or step.dim() > 0:
            raise TypeError(f"{op}: steps[{i}] is {step.dtype} {tuple(step.shape)}; accepted: 0-D float32 tensors")
        if step.device != params[0].device:
            _check.same_device(op, **{"params[0]": params[0], f"steps[{i}]": step})


def _check_length(op: str, name: str, values: Sequence[Any], params: Tensors) -> None:
    if len(values) != len(params):
        raise ValueError(f"{op}: {name} has {len(values)} entries; expected one for each of the {len(params)} params")


def _check_flags(op: str, param: Tensor, **flags: Tensor | None) -> None:
    for name, flag in flags.items():
        if flag is not None and flag.numel() != 1:
            raise ValueError(f"{op}: {name} has shape {tuple(flag.shape)}; expected one element")
    _check.same_device(op, **{"params[0]": param}, **flags)


# --- ops ------------------------------------------------------------------------------------------------------------


def _update_fake(params: list[Tensor], *_: Any) -> Tensor:
    return params[0].new_empty(len(params), 2, dtype=accumulation_dtype(*params))


_update = define(
    "lamb_update",
    "(Tensor[] params, Tensor[] grads, Tensor(a!)[] exp_avgs, Tensor(b!)[] exp_avg_sqs, Tensor(c!)[] steps,"
    " float[] weight_decays, float beta1, float beta2, float eps, bool nvlamb, Tensor? grad_scale,"
    " Tensor? found_inf) -> Tensor squared_norms",
    reference=reference.lamb_update,
    fake=_update_fake,
)
_apply = define(
    "lamb_apply",
    "(Tensor(a!)[] params, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] steps, Tensor squared_norms,"
    " float[] lrs, float[] weight_decays, float beta1, float beta2, float eps, bool nvlamb,"
    " Tensor? found_inf) -> ()",
    reference=reference.lamb_apply,
    fake=None,
)
