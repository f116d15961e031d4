"""The gated product of a SwiGLU MLP (Shazeer 2020), alone or with the LayerNorm that follows it in EVA-02
(sub-LN).

    hidden = silu(gate) * up;  out = hidden, or LayerNorm(hidden) when there is a norm_weight

The hidden values are never rounded: the norm sees them in float32 (float64 for float64 input), and backward
computes them again from gate and up.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import accumulation_dtype
from .layer_norm import affine, norm_gradients, normalize


def swiglu_forward(
    gate: Tensor, up: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = _hidden(*_accumulate(gate, up))
    if norm_weight is None:
        return _contiguous(hidden, gate.dtype), hidden.new_empty(0), hidden.new_empty(0)
    normalized, mean, rstd = normalize(hidden, eps, rms=False)
    return _contiguous(affine(normalized, norm_weight, norm_bias), gate.dtype), mean, rstd


def swiglu_backward(
    dout: Tensor,
    gate: Tensor,
    up: Tensor,
    norm_weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = gate.dtype
    dhidden, gate, up = _accumulate(dout, gate, up)
    if norm_weight is None:
        dweight, dbias = dhidden.new_empty(0), dhidden.new_empty(0)
    else:
        hidden = _hidden(gate, up)
        dhidden, dweight, dbias = norm_gradients(dhidden, hidden, norm_weight, mean, rstd, False, wanted)
    dgate = torch.ops.aten.silu_backward(dhidden * up, gate)
    return _contiguous(dgate, dtype), _contiguous(dhidden * F.silu(gate), dtype), dweight, dbias


def _hidden(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _accumulate(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(accumulation_dtype(t)) for t in tensors)


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous()
