"""The gated product of a SwiGLU MLP, with the LayerNorm that may follow it."""

from typing import Any

from torch import Tensor

from .. import triton
from ..reference import swiglu as reference
from . import _check
from ._dtensors import ShardingRule
from ._op import define, differentiable


def swiglu(
    gate: Tensor,
    up: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    padding: int = 0,
) -> Tensor:
    """`silu(gate) * up` (Shazeer 2020), followed by a LayerNorm when `norm_weight` is given.

    The LayerNorm is the sub-LN of EVA-02 (Fang et al. 2023; Wang et al. 2022). `gate` and `up` are saved for backward;
    the product is recomputed.

    Args:
        gate, up: `[..., F]` in one dtype; may be halves of one packed projection.
        norm_weight, norm_bias: `[F]`, each in the dtype of `gate` or float32; None for no norm, or no bias.
        eps: added to the variance.
        padding: number of trailing channels that the norm's statistics don't count. They must be zero in `gate`, `up`,
            `norm_weight` and `norm_bias`, and are zero in the result and in all gradients if the gradient of the result
            is zero there. Rows of a multiple of 16 bytes are faster on GPUs.

    Returns:
        `[..., F]`, contiguous, in the dtype of `gate`, under autocast too. Computed in float32 (float64 for float64
        input).

    Raises:
        TypeError: for a dtype that isn't accepted.
        ValueError: for shapes or devices that don't fit together.

    Examples:
        >>> gate, up = torch.randn(2, 197, 2 * 2048).chunk(2, -1)  # of one packed projection
        >>> evakernels.swiglu(gate, up, torch.ones(2048), torch.zeros(2048)).shape
        torch.Size([2, 197, 2048])
    """
    out: Tensor = _forward(gate, up, norm_weight, norm_bias, eps, padding)
    return out


def _check_call(
    gate: Tensor, up: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, padding: int
) -> Any:
    op = "swiglu"
    _check.floating(op, gate=gate, up=up)
    if gate.dim() == 0:
        raise ValueError(f"{op}: gate must have shape [..., F], got ()")
    if norm_bias is not None and norm_weight is None:
        raise ValueError(f"{op}: norm_bias must be None without norm_weight, got {_check.kind(norm_bias)}")
    if up.dtype != gate.dtype:
        raise TypeError(f"{op}: up must be {gate.dtype} (as gate), got {up.dtype}")
    _check.parameter_dtype(op, gate, norm_weight=norm_weight, norm_bias=norm_bias)
    _check.same_device(op, gate=gate, up=up, norm_weight=norm_weight, norm_bias=norm_bias)
    _check.shape(op, "up", up, tuple(gate.shape), "gate.shape")
    _check.shape(op, "norm_weight", norm_weight, (gate.shape[-1],), "[F]")
    _check.shape(op, "norm_bias", norm_bias, (gate.shape[-1],), "[F]")
    if padding != 0:
        accepted = f"0 to {gate.shape[-1] - 1}, below the channels of gate"
        _check.integer(op, "padding", padding, accepted)
        if not 0 < padding < gate.shape[-1]:
            raise ValueError(f"{op}: padding must be an integer, {accepted}, got {padding}")
    return gate, up, *_check.in_one_dtype(norm_weight, norm_bias), _check.eps(op, eps), padding


# --- ops ------------------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gate, up, norm_weight, _, _, *padding = inputs  # the dispatcher drops defaults
    ctx.padding = padding[0] if padding else 0
    _, mean, rstd = output
    ctx.save_for_backward(gate, up, norm_weight, mean, rstd)


def _gradient(ctx: Any, dout: Tensor) -> Any:
    _, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    return _backward(dout, *ctx.saved_tensors, (needs_weight, needs_bias), ctx.padding)


def _triton_reasons(first: Tensor, /, *, norm_weight: Tensor | None = None, **_: Any) -> list[str]:
    return [] if norm_weight is None else triton.row_reasons(first, triton.MAX_SWIGLU_WIDTH)


_forward = define(
    reference.swiglu_forward,
    check=_check_call,
    sharding=ShardingRule(("gate", "up"), whole_rows=lambda gate, up, norm_weight, *rest: norm_weight is not None),
    triton_reasons=_triton_reasons,
)
_backward = define(reference.swiglu_backward, triton_reasons=_triton_reasons)
differentiable(_forward, _backward, setup_context=_setup, formula=_gradient, returned=1)
