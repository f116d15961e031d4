"""The SwiGLU MLP as one op: torch's matmuls around `swiglu`, and a product that is recomputed in backward.

On GPUs w1 and w2 are copied into one matrix, and the hidden width is padded with zeros to rows of a multiple of 128
bytes: TMA and the fast kernels of cuBLAS refuse rows such as the 5,460 bytes of EVA02-L's 2,730 channels. The copies
live during one pass; parameters, gradients and checkpoints have the model's width.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import autocast, backends
from .._modes import is_checkpointed
from ..nn.linear import linear, weight_gradient
from ..reference import swiglu_mlp as reference
from . import _check
from ._op import define, differentiable
from .swiglu import swiglu

ALIGNED, MULTIPLE = 8, 64
"""A hidden width that isn't a multiple of the first number is padded to a multiple of the second."""

MIN_ROWS = 1 << 10
"""Rows of x on a GPU from which aligned matmuls are predicted to save more time than copies of the matrices take."""


def swiglu_mlp(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    b3: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`w3 norm(silu(w1 x + b1) * (w2 x + b2)) + b3`, the MLP of EVA-02 (Fang et al. 2023).

    `x`, the gate and the up projection are saved for backward, and neither the product nor copies of the weights in
    autocast's dtype; the product is recomputed. Under `torch.utils.checkpoint` the matmuls and `swiglu` run as separate
    operators, among which a policy chooses, and of which the last isn't repeated.

    On GPUs the matmuls have a hidden width of a multiple of 16 bytes: other widths are padded with zeros inside the op.
    `EVAKERNELS_PAD_HIDDEN=1` in the environment also pads on CPUs, `EVAKERNELS_PAD_HIDDEN=0` pads nowhere.

    Args:
        x: `[..., C]`.
        w1, w2: `[F, C]`, of the gate and of the up projection, each in the dtype of `x` or float32.
        w3: `[D, F]`.
        b1, b2, b3: `[F]`, `[F]` and `[D]`, or None.
        norm_weight, norm_bias: `[F]`, of the LayerNorm of the product, in the dtype of `x` or float32; None for no
            norm, or no bias.
        eps: added to the variance.

    Returns:
        `[..., D]` in the dtype of `x`, or of autocast.

    Raises:
        TypeError: for a dtype that isn't accepted.
        ValueError: for shapes or devices that don't fit together.

    Examples:
        >>> w1, w2, w3 = torch.randn(8, 4), torch.randn(8, 4), torch.randn(4, 8)
        >>> evakernels.swiglu_mlp(torch.randn(2, 3, 4), w1, w2, w3).shape
        torch.Size([2, 3, 4])
    """
    args = x, w1, w2, w3, b1, b2, b3, norm_weight, norm_bias, eps
    out: Tensor
    if is_checkpointed():
        out, *_ = _compose(*_check_call(*args))
    else:
        out = _forward(*args)
    return out


def _check_call(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    b3: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Any:
    op = "swiglu_mlp"
    _check.floating(op, x=x, w1=w1, w2=w2, w3=w3)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have shape [..., C], got a scalar")
    if norm_bias is not None and norm_weight is None:
        raise ValueError(f"{op}: norm_bias must be None without norm_weight, got a tensor")
    for name, weight, layout in (("w1", w1, "[F, C]"), ("w3", w3, "[D, F]")):
        if weight.dim() != 2:
            raise ValueError(f"{op}: {name} must have shape {layout}, got {tuple(weight.shape)}")
    parameters: dict[str, Any] = {"w1": w1, "w2": w2, "w3": w3, "b1": b1, "b2": b2, "b3": b3}
    (x,) = autocast.matmul_inputs(x)
    if not autocast.is_on(x.device.type):
        _check.parameter_dtype(op, x, **parameters)
    _check.parameter_dtype(op, x, norm_weight=norm_weight, norm_bias=norm_bias)
    _check.same_device(op, x=x, **parameters, norm_weight=norm_weight, norm_bias=norm_bias)
    hidden = w1.shape[0]
    _check.shape(op, "x", x, (*x.shape[:-1], w1.shape[1]), "[..., C]")
    _check.shape(op, "w2", w2, tuple(w1.shape), "w1.shape")
    _check.shape(op, "w3", w3, (w3.shape[0], hidden), "[D, F]")
    _check.shape(op, "b3", b3, (w3.shape[0],), "[D]")
    for name, vector in {"b1": b1, "b2": b2, "norm_weight": norm_weight, "norm_bias": norm_bias}.items():
        _check.shape(op, name, vector, (hidden,), "[F]")
    return x, w1, w2, w3, b1, b2, b3, *_check.in_one_dtype(norm_weight, norm_bias), _check.eps(op, eps)


# --- matrices -------------------------------------------------------------------------------------------------------


def _packed_width(x: Tensor, hidden: int) -> int:
    """Rows of w1 and of w2, padding included, in the packed matrix; 0 if the matrices aren't packed."""
    setting = os.environ.get("EVAKERNELS_PAD_HIDDEN", "")
    if setting not in ("", "0", "1"):
        raise ValueError(f"the environment variable EVAKERNELS_PAD_HIDDEN must be 0 or 1, got {setting!r}")
    if setting != "1" and not (x.is_cuda and x.numel() >= MIN_ROWS * x.shape[-1]):
        return 0
    return hidden if hidden % ALIGNED == 0 or setting == "0" else -(-hidden // MULTIPLE) * MULTIPLE


def _cat(parts: list[Tensor], dim: int, dtype: torch.dtype) -> Tensor:
    if torch.is_grad_enabled():
        return torch.cat([part.to(dtype) for part in parts], dim)
    return torch.cat(parts, dim, out=parts[0].new_empty(0, dtype=dtype))  # casts and copies in one pass


def _pack(first: Tensor, second: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Both tensors along the first dimension, each followed by zeros up to `width`."""
    padding = width - first.shape[0]
    if padding == 0:
        return _cat([first, second], 0, dtype)
    zeros = first.new_zeros(padding, *first.shape[1:])
    return _cat([first, zeros, second, zeros], 0, dtype)


def _pack_biases(b1: Tensor | None, b2: Tensor | None, width: int, dtype: torch.dtype) -> Tensor | None:
    bias = b1 if b1 is not None else b2
    if bias is None:
        return None
    zeros = torch.zeros_like(bias)
    return _pack(zeros if b1 is None else b1, zeros if b2 is None else b2, width, dtype)


def _pad(parameter: Tensor | None, padding: int, dtype: torch.dtype | None = None, dim: int = -1) -> Any:
    """The parameter in `dtype`, by default its own, with zeros appended along a dimension."""
    if parameter is None:
        return None
    dtype = dtype or parameter.dtype
    if padding == 0:
        return parameter.to(dtype)
    shape = list(parameter.shape)
    shape[dim] = padding
    return _cat([parameter, parameter.new_zeros(shape)], dim, dtype)


# --- both passes ----------------------------------------------------------------------------------------------------


def _compose(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    b3: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the gate and the up projection; or both halves as the second, and an empty third."""
    hidden, dtype = w1.shape[0], x.dtype
    width = _packed_width(x, hidden)
    padding = width - hidden if width else 0
    halves: Any
    if width:
        gate = linear(x, _pack(w1, w2, width, dtype), _pack_biases(b1, b2, width, dtype))
        halves, up = gate.chunk(2, -1), x.new_empty(0)
    else:
        gate, up = (linear(x, w.to(dtype), _pad(b, 0, dtype)) for w, b in ((w1, b1), (w2, b2)))
        halves = gate, up
    product = swiglu(halves[0], halves[1], _pad(norm_weight, padding), _pad(norm_bias, padding), eps, padding)
    return linear(product, _pad(w3, padding, dtype), _pad(b3, 0, dtype)), gate, up


def _run_backward(
    dout: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gate: Tensor,
    up: Tensor,
    eps: float,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, ...]:
    hidden, dtype = w1.shape[0], x.dtype
    is_packed = gate.shape[-1] != hidden
    padding = gate.shape[-1] // 2 - hidden if is_packed else 0
    halves = gate.chunk(2, -1) if is_packed else (gate, up)
    norm = _pad(norm_weight, padding), _pad(norm_bias, padding)
    rows, dout_rows = _rows(x), _rows(dout)

    product, mean, rstd = backends.OPERATORS.swiglu_forward(*halves, *norm, eps, padding)
    dw3 = _weight_gradient(dout_rows, _rows(product), w3) if needs_grad[3] else x.new_empty(0)
    del product
    db3 = dout_rows.sum(0) if needs_grad[6] else x.new_empty(0)
    if not any((*needs_grad[:3], *needs_grad[4:6], *needs_grad[7:])):
        dx, dw1, dw2, *others = (x.new_empty(0) for _ in range(7))
        return dx, dw1, dw2, dw3, *others[:2], db3, *others[2:]
    dproduct = linear(dout, _pad(w3, padding, dtype).t())
    dgate, dup, *norm_gradients = backends.OPERATORS.swiglu_backward(
        dproduct, *halves, norm[0], mean, rstd, needs_grad[7:], padding
    )
    del dproduct

    dgate_rows, dup_rows = _rows(dgate), _rows(dup)
    dx = _input_gradient(x, dgate_rows, dup_rows, w1, w2) if needs_grad[0] else x.new_empty(0)
    dw1 = _weight_gradient(dgate_rows, rows, w1) if needs_grad[1] else x.new_empty(0)
    dw2 = _weight_gradient(dup_rows, rows, w2) if needs_grad[2] else x.new_empty(0)
    db1, db2 = (
        d.sum(0)[:hidden] if needed else x.new_empty(0)
        for d, needed in zip((dgate_rows, dup_rows), needs_grad[4:6], strict=True)
    )
    return dx, dw1, dw2, dw3, db1, db2, db3, *(t[:hidden] for t in norm_gradients)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `weight`, without padding."""
    outputs, inputs = weight.shape
    return weight_gradient(dy, x)[:outputs, :inputs].to(weight.dtype).contiguous()


def _input_gradient(x: Tensor, dgate: Tensor, dup: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    first, second = (_pad(w, dgate.shape[1] - w.shape[0], x.dtype, dim=0) for w in (w1, w2))
    dx = linear(dgate, first.t())
    # On a GPU the second matmul adds; on a CPU oneDNN, which can't, may be faster.
    return (dx.addmm_(dup, second) if x.is_cuda else dx.add_(linear(dup, second.t()))).view(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w1, w2, w3, _, _, _, norm_weight, norm_bias, ctx.eps = inputs
    _, gate, up = output
    ctx.save_for_backward(x, w1, w2, w3, norm_weight, norm_bias, gate, up)


def _gradient(ctx: Any, dout: Tensor) -> Any:
    return _backward(dout, *ctx.saved_tensors, ctx.eps, tuple(ctx.needs_input_grad[:9]))


_forward = define(reference.swiglu_mlp_forward, check=_check_call, fake=_compose)
_backward = define(reference.swiglu_mlp_backward, fake=_run_backward)
differentiable(_forward, _backward, setup_context=_setup, formula=_gradient, returned=1)


def _reasons(op: str, backend: str) -> backends.Reasons:
    """Why `backend` doesn't support the gated product of a call."""

    def reasons(*args: Any) -> list[str]:
        arguments = backends.by_name(op, args)
        if "norm_weight" not in arguments:
            return backends.unsupported_reasons("swiglu_forward", backend)
        product = arguments["x"].new_empty(0, arguments["w1"].shape[0])
        return backends.unsupported_reasons(
            "swiglu_forward", backend, product, product, arguments["norm_weight"], None, 0.0
        )

    return reasons


for _op, _function in ((_forward, _compose), (_backward, _run_backward)):
    for _name in backends.PREFERENCE:
        backends.register(_op.name, _name, _function, _reasons(_op.name, _name))
