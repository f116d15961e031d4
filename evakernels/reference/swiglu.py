"""The gated product of a SwiGLU MLP (Shazeer 2020), alone or with the LayerNorm that follows it in EVA-02
(sub-LN).

    hidden = silu(gate) * up;  out = hidden, or LayerNorm(hidden) when there is a norm_weight

The hidden values are never rounded: the norm sees them in float32 (float64 for float64 input), and backward
computes them again from gate and up. The last `padding` channels are zero in every input and output; the norm's
statistics don't count them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import accumulation_dtype
from .layer_norm import affine, norm_gradients, normalize


def swiglu_forward(
    gate: Tensor, up: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, padding: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    if padding and norm_weight is not None:
        parts: list[Any] = [None if t is None else t[..., :-padding] for t in (gate, up, norm_weight, norm_bias)]
        out, mean, rstd = swiglu_forward(parts[0], parts[1], parts[2], parts[3], eps)
        return F.pad(out, (0, padding)), mean, rstd
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
    needs_grad: Sequence[bool],
    padding: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if padding and norm_weight is not None:
        parts: list[Any] = [t[..., :-padding] for t in (dout, gate, up, norm_weight)]
        dgate, dup, *parameter_gradients = swiglu_backward(
            parts[0], parts[1], parts[2], parts[3], mean, rstd, needs_grad
        )
        dweight, dbias = (F.pad(t, (0, padding)) if t.numel() else t for t in parameter_gradients)
        return F.pad(dgate, (0, padding)), F.pad(dup, (0, padding)), dweight, dbias
    dtype = gate.dtype
    dhidden, gate, up = _accumulate(dout, gate, up)
    if norm_weight is None:
        dweight, dbias = dhidden.new_empty(0), dhidden.new_empty(0)
    else:
        hidden = _hidden(gate, up)
        dhidden, dweight, dbias = norm_gradients(dhidden, hidden, norm_weight, mean, rstd, False, needs_grad)
    dgate = torch.ops.aten.silu_backward(dhidden * up, gate)
    return _contiguous(dgate, dtype), _contiguous(dhidden * F.silu(gate), dtype), dweight, dbias


def _hidden(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _accumulate(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(accumulation_dtype(t)) for t in tensors)


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous()
