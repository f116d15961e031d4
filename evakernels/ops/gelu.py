"""GELU, with the bias of the linear layer before it."""

from typing import Any

from torch import Tensor

from .. import names
from ..reference import gelu as reference
from . import _check
from ._dtensors import ShardingRule
from ._op import define, differentiable


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """`gelu(x + bias)` (Hendrycks and Gimpel 2016), element by element.

    Pass the bias of the previous linear layer here instead of to the layer. `x` is saved for backward.

    Args:
        x: `[..., F]`.
        bias: `[F]`, in the dtype of `x` or float32; or None.
        approximate: form of the normal distribution function: `"none"` for the exact one, `"tanh"`, or `"sigmoid"` for
            `sigmoid(1.702 x)`, CLIP's QuickGELU.

    Returns:
        `[..., F]`, contiguous, in the dtype of `x`, under autocast too.

    Raises:
        TypeError: for a dtype that isn't accepted.
        ValueError: for shapes or devices that don't fit together, or an unknown approximation.

    Examples:
        >>> layer = torch.nn.Linear(4, 8)
        >>> evakernels.gelu(torch.ones(2, 4) @ layer.weight.T, layer.bias).shape
        torch.Size([2, 8])
    """
    if approximate not in reference.FORMS:
        raise ValueError(names.unknown("gelu: approximate", approximate, reference.FORMS))
    out: Tensor = _forward(x, bias, reference.FORMS.index(approximate))
    return out


def _check_call(x: Tensor, bias: Tensor | None, form: int) -> Any:
    op = "gelu"
    _check.floating(op, x=x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have shape [..., F], got ()")
    _check.parameter_dtype(op, x, bias=bias)
    _check.same_device(op, x=x, bias=bias)
    _check.shape(op, "bias", bias, (x.shape[-1],), "[F]")
    return x, bias, form


# --- ops ------------------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.form = inputs
    ctx.save_for_backward(x, bias)


def _gradient(ctx: Any, dout: Tensor) -> Any:
    _, needs_bias, *_ = ctx.needs_input_grad
    return _backward(dout, *ctx.saved_tensors, ctx.form, (needs_bias,))


_forward = define(
    reference.gelu_forward, check=_check_call, sharding=ShardingRule(("x",), whole_rows=lambda *args: False)
)
_backward = define(reference.gelu_backward)
differentiable(_forward, _backward, setup_context=_setup, formula=_gradient)
