"""The SwiGLU MLP as a module."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from .._modes import is_observed
from ..ops import swiglu, swiglu_mlp
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
        """`[..., width]` to the same shape; by `evakernels.swiglu_mlp` on GPUs."""
        weights: Any = [layer.weight for layer in (self.w1, self.w2, self.w3)]
        if self._is_plain() and runs_as_one_op(x, *weights):
            norm: Any = () if self.ffn_ln is None else (self.ffn_ln.weight, self.ffn_ln.bias, self.ffn_ln.eps)
            parameters: list[Any] = [*weights, self.w1.bias, self.w2.bias, self.w3.bias, *norm]
            return swiglu_mlp(x, *parameters)
        gate, up = self.w1(x), self.w2(x)
        if self.ffn_ln is None:
            hidden = swiglu(gate, up)
        else:
            hidden = swiglu(gate, up, self.ffn_ln.weight, self.ffn_ln.bias, self.ffn_ln.eps)
        y: Tensor = self.w3(hidden)
        return y

    def _is_plain(self) -> bool:
        """Whether no hook, adapter or parametrization changes one of the layers."""
        classes = {"w1": Linear, "w2": Linear, "w3": Linear, "ffn_ln": LayerNorm}
        parts = ((classes[name], module) for name, module in self._modules.items() if module is not None)
        return all(type(module) is expected and not is_observed(module) for expected, module in parts)


def runs_as_one_op(x: Tensor, *weights: Tensor) -> bool:
    """Whether `swiglu_mlp` runs an MLP: on GPUs, and elsewhere if padding is forced. False for tensor subclasses."""
    is_plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in (x, *weights))
    return is_plain and (x.is_cuda or os.environ.get("EVAKERNELS_PAD_HIDDEN") == "1")
