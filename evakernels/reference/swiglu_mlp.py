"""The SwiGLU MLP (Shazeer 2020; with sub-LN in EVA-02, Fang et al. 2023).

    out = w3 (norm(silu(w1 x + b1) * (w2 x + b2))) + b3

Parameters are cast to the dtype of x. Backward computes the product again from gate and up.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .swiglu import swiglu_backward, swiglu_forward


def swiglu_mlp_forward(
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
    gate, up = _linear(x, w1, b1), _linear(x, w2, b2)
    hidden, _, _ = swiglu_forward(gate, up, norm_weight, norm_bias, eps)
    return _linear(hidden, w3, b3), gate, up


def swiglu_mlp_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, w2, w3, b1, b2, b3, norm_weight and norm_bias; empty where not needed."""
    hidden, mean, rstd = swiglu_forward(gate, up, norm_weight, norm_bias, eps)
    dhidden = dout @ w3.to(x.dtype)
    dgate, dup, *norm_gradients = swiglu_backward(dhidden, gate, up, norm_weight, mean, rstd, needs_grad[-2:])
    gradients = [(dgate @ w1.to(x.dtype) + dup @ w2.to(x.dtype)) if needs_grad[0] else x.new_empty(0)]
    pairs = (dgate, x, w1), (dup, x, w2), (dout, hidden, w3)
    for needed, (dy, inputs, weight) in zip(needs_grad[1:4], pairs, strict=True):
        gradients.append((_rows(dy).t() @ _rows(inputs)).to(weight.dtype) if needed else x.new_empty(0))
    for needed, (dy, *_) in zip(needs_grad[4:7], pairs, strict=True):
        gradients.append(_rows(dy).sum(0) if needed else x.new_empty(0))
    dx, dw1, dw2, dw3, db1, db2, db3 = gradients
    return dx, dw1, dw2, dw3, db1, db2, db3, norm_gradients[0], norm_gradients[1]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
