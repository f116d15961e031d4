"""GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415) of a sum with a bias.

    out = s * P(s) with s = x + bias, where P is the normal distribution function
    tanh    P(s) is 0.5 * (1 + tanh(sqrt(2 / pi) * (s + 0.044715 * s^3)))

torch's functions compute each of 16-bit numbers in float32. The sum is rounded to the dtype that x and bias have in
common, as that of a linear layer is; gradients of the bias are summed in float32 (float64 for float64 input).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from evakernels.reference._numerics import accumulation_dtype


def gelu_forward(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    if bias is None:
        return F.gelu(x.contiguous(), approximate=_approximate(tanh))
    out: Tensor = torch.ops.aten.gelu_(_sum(x, bias), approximate=_approximate(tanh))
    return out.to(x.dtype)


def gelu_backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    if bias is None:
        dx = torch.ops.aten.gelu_backward(dout.contiguous(), x.contiguous(), approximate=_approximate(tanh))
        return dx, x.new_empty(0)
    total = _sum(x, bias)
    dx = torch.ops.aten.gelu_backward(dout.to(total.dtype).contiguous(), total, approximate=_approximate(tanh))
    if not wanted[0]:
        return dx.to(x.dtype), x.new_empty(0)
    dbias = dx.flatten(0, -2).sum(0, dtype=accumulation_dtype(dx)) if dx.dim() > 1 else dx
    return dx.to(x.dtype), dbias.to(bias.dtype)


def _sum(x: Tensor, bias: Tensor) -> Tensor:
    return (x + bias).contiguous()


def _approximate(tanh: bool) -> str:
    return "tanh" if tanh else "none"
