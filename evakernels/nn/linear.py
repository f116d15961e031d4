"""Matrix products of a linear layer, from the faster of torch's two libraries for CPUs."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _native, backends
from .._modes import needs_dispatcher, needs_grad
from ..autocast import is_on


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, forced: bool = False) -> Tensor:
    """`torch.nn.functional.linear`, which it takes the place of, with another library where that is faster.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`, which `evakernels.nn.freeze` may have laid out.
        bias: `[out]`.
        forced: take oneDNN's where torch's function would be faster, too. Gradients are taken from the faster one.

    Returns:
        `[..., out]`. On a CPU in eager mode, in float32 on AMD's processors with AVX-512 and in bfloat16 where oneDNN
        has it, the product and the sum with the bias are one call of oneDNN. Otherwise this is torch's function.
    """
    # A frozen weight, of a class of its own, multiplies by itself.
    is_plain = _is_plain(weight) and _is_plain(x) and (bias is None or _is_plain(bias))
    if not (is_plain and x.is_cpu and weight.is_cpu and not needs_dispatcher() and _is_served(x, weight, bias, forced)):
        return F.linear(x, weight, bias)
    if needs_grad(x, weight, bias):
        y: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    return _product(x, weight, bias)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is a tensor of torch's own class."""
    return type(tensor) is Tensor or type(tensor) is nn.Parameter


class Linear(nn.Linear):
    """`torch.nn.Linear`, computed by `evakernels.nn.linear`."""

    linear_weights = ("weight",)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = _product(x, weight, bias)
        # oneDNN gives a view of rows, which autograd wouldn't let an activation change in place.
        own: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
        return own

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dx_wanted, dweight_wanted, dbias_wanted = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])  # which vmap knows, unlike flatten
        return (
            linear(dy, weight.t()) if dx_wanted else None,
            _weight_gradient(rows, x.flatten(0, -2)) if dweight_wanted else None,
            rows.sum(0) if dbias_wanted else None,
        )


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    # oneDNN wants the longer side as the columns of the result; otherwise MKL is as fast.
    return linear(dy.t(), x.t()) if x.shape[1] > dy.shape[1] else dy.t() @ x


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    backends.observe("linear", "oneDNN")
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _is_served(x: Tensor, weight: Tensor, bias: Tensor | None, forced: bool) -> bool:
    dtype = x.dtype
    return (
        (
            dtype in (multiplied_dtypes() if forced else served_dtypes())
            or backends.refuse(f"{str(dtype).removeprefix('torch.')} on cpu")
        )
        and weight.dtype == dtype
        and (bias is None or bias.dtype == dtype)
        and x.dim() >= 2
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and (forced or x.numel() * weight.shape[0] >= _MIN_MACS[dtype] or backends.refuse("too small"))
        and torch._C._get_mkldnn_enabled()
        and (not is_on("cpu") or backends.refuse("autocast"))
    )


_MIN_MACS = {torch.float32: 1 << 24, torch.bfloat16: 1 << 31}
"""Smaller products take less time than it would save: in bfloat16 with gradients 0.91 to 1.00 times as fast up to
800 rows of 768 to 3,072 columns and back (AMD EPYC, 2 threads, torch 2.13, 2026-11-25)."""


@cache
def multiplied_dtypes() -> frozenset[torch.dtype]:
    """Those that oneDNN multiplies on this machine."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return frozenset()
    half = {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    return frozenset({torch.float32, *half})


@cache
def served_dtypes() -> frozenset[torch.dtype]:
    """In bfloat16 torch asks oneDNN itself, but gives the bias a pass of its own. In float32 it asks MKL, which isn't
    at its best on AMD's processors with AVX-512. On those with AVX2 oneDNN is 0.67 to 1.1 times as fast (Zen 3)."""
    slow_in_torch = _native.is_amd() and torch.cpu.get_capabilities().get("avx512_f", False)
    return multiplied_dtypes() - (set() if slow_in_torch else {torch.float32})
