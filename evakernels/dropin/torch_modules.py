"""Rules for torch's own modules."""

from typing import Any

from torch import Tensor

from evakernels.dropin._gate import serves
from evakernels.dropin._rule import Rule
from evakernels.dropin._serve import own_norm_parameters, role
from evakernels.dropin._swap import Swapped
from evakernels.nn import linear
from evakernels.ops import gelu, layer_norm, rms_norm


class Linear(Swapped):
    """On a CPU, by oneDNN where that is faster."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, forced=self.is_forced)


class LayerNorm(Swapped):
    """Over the last dimension."""

    def forward(self, input: Tensor) -> Tensor:
        if serves("layer_norm", input, forced=self.is_forced):
            parameters = own_norm_parameters(self, input)
            if parameters is not None:
                return layer_norm(input, *parameters)
        y: Tensor = super().forward(input)
        return y


class RMSNorm(Swapped):
    """Over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        if serves("rms_norm", x, forced=self.is_forced):
            parameters = own_norm_parameters(self, x)
            if parameters is not None:
                weight, _, eps = parameters
                return rms_norm(x, weight, eps)
        y: Tensor = super().forward(x)
        return y


class GELU(Swapped):
    """By tanh, the only one that some classes have, or exact."""

    def forward(self, input: Tensor) -> Tensor:
        if serves(_gelu_gate(self), input, forced=self.is_forced):
            return gelu(input, approximate=getattr(self, "approximate", "tanh"))
        y: Tensor = super().forward(input)
        return y


class QuickGELU(Swapped):
    """CLIP's, of three libraries."""

    def forward(self, input: Tensor) -> Tensor:
        if serves("quick_gelu", input, forced=self.is_forced):
            return gelu(input, approximate="sigmoid")
        y: Tensor = super().forward(input)
        return y


def last_dimension(module: Any) -> str | None:
    """Why a norm isn't one of the last dimension."""
    shape = module.normalized_shape
    return None if len(shape) == 1 else f"it normalises {len(shape)} dimensions"


def by_silu(module: Any) -> str | None:
    """Why a gated MLP isn't SwiGLU."""
    act = getattr(module, "act_fn", getattr(module, "act", None))
    return None if role(act) == "silu" else f"its activation is {type(act).__name__}"


def _gelu_gate(module: Any) -> str:
    return "gelu" if getattr(module, "approximate", "tanh") == "tanh" else "exact_gelu"


_NORMS = "torch.nn.modules.normalization"

RULES = (
    Rule(Linear, "torch.nn.modules.linear.Linear", "linear", "linear"),
    Rule(LayerNorm, f"{_NORMS}.LayerNorm", "layer_norm", "layer_norm", reason=last_dimension),
    Rule(RMSNorm, f"{_NORMS}.RMSNorm", "rms_norm", "rms_norm", reason=last_dimension),
    Rule(GELU, "torch.nn.modules.activation.GELU", "gelu", _gelu_gate),
)
