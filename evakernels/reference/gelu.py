"""GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415) of a sum with a bias.

    out = s * P(s) with s = x + bias, where P is the normal distribution function
    tanh     P(s) is 0.5 * (1 + tanh(sqrt(2 / pi) * (s + 0.044715 * s^3)))
    sigmoid  P(s) is sigmoid(1.702 * s): QuickGELU

torch's functions compute 16-bit numbers in float32. The sum is rounded to the common dtype of x and bias, as in a
linear layer; gradients of the bias are summed in float32 (float64 for float64 input).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import accumulation_dtype

FORMS = ("none", "tanh", "sigmoid")
"""Forms by index; the exact one and torch's approximation have torch's names."""
SLOPE = 1.702


def gelu_forward(x: Tensor, bias: Tensor | None, form: int) -> Tensor:
    total = _total(x, bias)
    if FORMS[form] == "sigmoid":
        wide = total.to(accumulation_dtype(total))
        return (wide * torch.sigmoid(SLOPE * wide)).to(x.dtype)
    if bias is None:
        return F.gelu(total, approximate=FORMS[form])
    out: Tensor = torch.ops.aten.gelu_(total, approximate=FORMS[form])
    return out.to(x.dtype)


def gelu_backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, form: int, needs_grad: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    total = _total(x, bias)
    dout = dout.to(total.dtype).contiguous()
    if FORMS[form] == "sigmoid":  # silu(SLOPE * total) / SLOPE
        wide = accumulation_dtype(total)
        dx = torch.ops.aten.silu_backward(dout.to(wide), SLOPE * total.to(wide)).to(total.dtype)
    else:
        dx = torch.ops.aten.gelu_backward(dout, total, approximate=FORMS[form])
    if bias is None or not needs_grad[0]:
        return dx.to(x.dtype), x.new_empty(0, dtype=torch.float32)
    dbias = dx.flatten(0, -2).sum(0, dtype=accumulation_dtype(dx)) if dx.dim() > 1 else dx
    return dx.to(x.dtype), dbias.to(bias.dtype)


def _total(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.contiguous() if bias is None else (x + bias).contiguous()
