"""Matmuls of linear layers, by the faster of torch's two libraries for CPUs."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting

from .. import _native, backends
from .._modes import is_transformed, needs_dispatcher, needs_grad
from ..autocast import is_on


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, forced: bool = False) -> Tensor:
    """`torch.nn.functional.linear`, by another library where that is faster.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`, dense or prepacked by `evakernels.nn.freeze`.
        bias: `[out]`; cast to the dtype of the weight, such as a float32 bias of a bfloat16 weight.
        forced: use oneDNN where torch's function is faster, too; gradients use the faster one.

    Returns:
        `[..., out]`. On a CPU, in float32 on AMD's processors with AVX-512 and in bfloat16 where oneDNN supports it,
        the matmul and the bias are one call of oneDNN. Otherwise, and in exported programs, this is torch's function,
        which `torch.compile` itself runs on oneDNN in bfloat16.
    """
    if bias is not None and bias.dtype != weight.dtype:
        bias = bias.to(weight.dtype)
    # A frozen weight is a tensor subclass with its own matmul. Small calls leave first: their host time counts.
    if not (
        is_plain_tensor(x)
        and is_plain_tensor(weight)
        and (not is_compiling() or _is_opaque(x.dtype, forced))  # before sizes, on which compiled code would depend
        and x.numel() * weight.shape[0] >= (1 if forced else _MIN_MACS.get(x.dtype, 0))
        and (bias is None or is_plain_tensor(bias))
        and x.is_cpu
        and weight.is_cpu
        and (is_compiling() or not needs_dispatcher())
        and _is_supported(x, weight, bias, forced)
    ):
        return F.linear(x, weight, bias)
    if is_compiling() or needs_grad(x, weight, bias):
        y: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    return _multiply(x, weight, bias)


def is_plain_tensor(tensor: Tensor) -> bool:
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
        y = _multiply(x, weight, bias)
        # oneDNN returns a view of rows, which autograd doesn't let an activation change in place.
        result: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])  # vmap supports reshape, but not flatten
        return (
            linear(dy, weight.t()) if needs_dx else None,
            weight_gradient(rows, x.flatten(0, -2)) if needs_dweight else None,
            rows.sum(0) if needs_dbias else None,
        )


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient `[out, in]` of a weight, from `dy` `[rows, out]` and `x` `[rows, in]`."""
    # oneDNN is faster than MKL only with the longer side as the columns of the result.
    return linear(dy.t(), x.t()) if x.shape[1] > dy.shape[1] else dy.t() @ x


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _opaque(x, weight, bias) if is_compiling() else _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    backends.observe("linear", "oneDNN")
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


@torch.library.custom_op(f"{backends.NAMESPACE}::linear", mutates_args=())
def _opaque(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN's matmul in compiled code: inductor supports oneDNN's own op with prepacked weights only."""
    return _product(x, weight, bias)


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _is_opaque(dtype: torch.dtype, forced: bool) -> bool:
    # Exported programs run without this library, and inductor itself calls oneDNN in bfloat16.
    return dtype == torch.float32 and _is_chosen(dtype, forced) and not (is_exporting() or is_transformed())


def _is_supported(x: Tensor, weight: Tensor, bias: Tensor | None, forced: bool) -> bool:
    dtype = x.dtype
    return (
        _is_chosen(dtype, forced)
        and weight.dtype == dtype
        and (bias is None or bias.dtype == dtype)
        and x.dim() >= 2
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and not is_on("cpu")
    )


def _is_chosen(dtype: torch.dtype, forced: bool) -> bool:
    return dtype in (matmul_dtypes() if forced else faster_dtypes()) and torch._C._get_mkldnn_enabled()


_is_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in `_modes`


_MIN_MACS = {torch.float32: 1 << 24, torch.bfloat16: 1 << 31}
"""Minimum number of multiplications by dtype; oneDNN's call overhead exceeds its gain in smaller matmuls."""


@cache
def matmul_dtypes() -> frozenset[torch.dtype]:
    """The dtypes of oneDNN's matmuls on this machine."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return frozenset()
    has_half = torch.ops.mkldnn._is_mkldnn_bf16_supported() and _native.processor() != "avx2"
    return frozenset({torch.float32, torch.bfloat16} if has_half else {torch.float32})


@cache
def faster_dtypes() -> frozenset[torch.dtype]:
    """The dtypes in which oneDNN is faster than torch's function.

    In bfloat16 torch calls oneDNN, too, but adds the bias in another pass. In float32 it calls MKL, which is slow on
    AMD's processors with AVX-512, but not on those with AVX2.
    """
    return matmul_dtypes() - (set() if _native.processor() == "amd" else {torch.float32})
