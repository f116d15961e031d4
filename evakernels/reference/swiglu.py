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


def swiglu_forward(
    gate: Tensor, up: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = _hidden(*_accumulate(gate, up))
    if norm_weight is None:
        return _contiguous(hidden, gate.dtype), hidden.new_empty(0), hidden.new_empty(0)
    weight, bias = (None if p is None else p.to(hidden.dtype) for p in (norm_weight, norm_bias))
    out, mean, rstd = torch.native_layer_norm(hidden, hidden.shape[-1:], weight, bias, eps)
    # Rounding moved the mean; in a row of equal elements nothing but that error would reach the weight's gradient.
    mean = mean + (hidden - mean).mean(-1, keepdim=True)
    return _contiguous(out, gate.dtype), mean.squeeze(-1), rstd.squeeze(-1)


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
        dhidden, dweight, dbias = _norm_backward(dhidden, _hidden(gate, up), norm_weight, mean, rstd, wanted)
    dgate = torch.ops.aten.silu_backward(dhidden * up, gate)
    return _contiguous(dgate, dtype), _contiguous(dhidden * F.silu(gate), dtype), dweight, dbias


def _norm_backward(
    dout: Tensor, hidden: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    # torch's kernel makes one pass where the formula written out makes eleven. It wants a bias, but doesn't read it.
    scale = weight.to(hidden.dtype)
    statistics = mean.unsqueeze(-1), rstd.unsqueeze(-1)
    dhidden, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dout, hidden, hidden.shape[-1:], *statistics, scale, scale, [True, *wanted]
    )
    found = (
        x.to(weight.dtype) if wants else rstd.new_empty(0) for x, wants in zip((dweight, dbias), wanted, strict=True)
    )
    return dhidden, *found


def _hidden(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _accumulate(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(accumulation_dtype(t)) for t in tensors)


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous()
