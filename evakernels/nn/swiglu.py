"""The SwiGLU MLP as a module."""

import torch
from torch import Tensor, nn

from ..ops import swiglu
from .layer_norm import LayerNorm
from .linear import Linear


class SwiGLU(nn.Module):
    """`w3(ffn_ln(silu(w1(x)) * w2(x)))`, the MLP of EVA-02 (Fang et al. 2023), with its state-dict names.

    Args:
        width: channels of input and output.
        hidden: channels of the gated product.
        sub_ln: whether there is a LayerNorm `ffn_ln` between the product and `w3`.
        eps: eps of that norm.
        bias: whether the three projections have biases.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        sub_ln: bool = True,
        eps: float = 1e-6,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.w1 = Linear(width, hidden, bias=bias, device=device, dtype=dtype)
        self.w2 = Linear(width, hidden, bias=bias, device=device, dtype=dtype)
        self.ffn_ln = LayerNorm(hidden, eps, device=device, dtype=dtype) if sub_ln else None
        self.w3 = Linear(hidden, width, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x), self.w2(x)
        if self.ffn_ln is None:
            hidden = swiglu(gate, up)
        else:
            hidden = swiglu(gate, up, self.ffn_ln.weight, self.ffn_ln.bias, self.ffn_ln.eps)
        y: Tensor = self.w3(hidden)
        return y
