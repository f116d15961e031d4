"""The same model in torch's own operators, as it would be written without this library's."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from evaclip.model.pooled import rotate_patches


class as_usual(TorchFunctionMode):
    """In its `with` block norms, residual adds, gated products and attention are the calls that one would write."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _USUAL.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    shape = x.shape[-1:]
    y = F.rms_norm(x, shape, weight, eps) if rms else F.layer_norm(x, shape, weight, bias, eps)
    return y.to(out_dtype or x.dtype), x.new_empty(0), x.new_empty(0)


def _add_layer_norm(
    residual: Tensor, branch: Tensor, weight: Any, bias: Any, layer_scale: Any, row_scale: Any, *rest: Any
) -> tuple[Tensor, ...]:
    x = residual + _scaled(branch, layer_scale, row_scale)
    y, *statistics = _layer_norm(x, weight, bias, *rest)
    return y, x, *statistics


def _layer_norm_add(
    residual: Tensor, branch: Tensor, weight: Any, bias: Any, layer_scale: Any, row_scale: Any, *rest: Any
) -> tuple[Tensor, ...]:
    y, *statistics = _layer_norm(branch, weight, bias, *rest)
    return residual + _scaled(y, layer_scale, row_scale), *statistics


def _scaled(branch: Tensor, layer_scale: Tensor | None, row_scale: Tensor | None) -> Tensor:
    branch = branch if layer_scale is None else branch * layer_scale
    return branch if row_scale is None else branch * row_scale[:, None, None]


def _swiglu(gate: Tensor, up: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    hidden = F.silu(gate) * up
    if weight is not None:
        hidden = _layer_norm(hidden, weight, bias, eps, False)[0]
    return hidden, gate.new_empty(0), gate.new_empty(0)


def _rope_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Any, sin: Any, token_index: Any, prefix: int, causal: bool, *rest: Any
) -> tuple[Tensor, Tensor]:
    if cos is not None:
        q, k = (rotate_patches(x, cos, sin, token_index) for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).contiguous(), q.new_empty(0)


_ops = torch.ops.evakernels
_USUAL: dict[Any, Callable[..., Any]] = {
    _ops.layer_norm_forward.default: _layer_norm,
    _ops.add_layer_norm_forward.default: _add_layer_norm,
    _ops.layer_norm_add_forward.default: _layer_norm_add,
    _ops.swiglu_forward.default: _swiglu,
    _ops.rope_attention_forward.default: _rope_attention,
}
