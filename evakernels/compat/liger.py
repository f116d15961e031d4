"""Liger's norms and SwiGLU, with its signatures and state, without Liger.

    from evakernels.compat.liger import LigerLayerNorm, LigerRMSNorm, LigerSwiGLUMLP

in the place of `from liger_kernel.transformers import ...` is the whole change. All of it also runs on a CPU.
"""

from typing import Any

import torch
from torch import Tensor, nn

from evakernels.compat._missing import missing
from evakernels.nn import Linear
from evakernels.ops import add_rms_norm, layer_norm, rms_norm, swiglu
from evakernels.reference._numerics import accumulation_dtype

__all__ = ["LigerFusedAddRMSNorm", "LigerLayerNorm", "LigerRMSNorm", "LigerSwiGLUMLP"]

__getattr__ = missing(
    __name__,
    {
        "liger_rotary_pos_emb": "evakernels.rope_attention rotates queries and keys inside the attention",
        "LigerRMSNormForGemma LigerRMSNormForGemma2 LigerRMSNormForGemma3 LigerRMSNormForQwen3Next": "it is "
        "LigerRMSNorm with offset=1.0 and init_fn='zeros'",
        "LigerRMSNormForOlmo2 LigerRMSNormForGlm4": "it is LigerRMSNorm",
        "LigerGEGLUMLP": "evakernels.gelu(x, approximate='tanh') is its activation",
        "LigerPhi3SwiGLUMLP LigerTiledSwiGLUMLP LigerQwen3MoeSwiGLUMLP": "evakernels.swiglu(gate, up) is its product",
        "LigerCrossEntropyLoss LigerFusedLinearCrossEntropyLoss": "there are no losses of a vocabulary",
        "AutoLigerKernelForCausalLM": "evakernels.accelerate takes the model itself",
    },
)

_INITIAL = {"ones": torch.ones, "zeros": torch.zeros}
_CASTING_MODES = ("llama", "gemma", "none")


def _initial(name: str, init_fn: str, size: int) -> nn.Parameter:
    if init_fn not in _INITIAL:
        raise ValueError(f"{name}: init_fn is {init_fn!r}; accepted: {', '.join(map(repr, _INITIAL))}")
    return nn.Parameter(_INITIAL[init_fn](size))


class LigerLayerNorm(nn.Module):
    """Liger's `LigerLayerNorm`, by `evakernels.layer_norm`.

    Args:
        hidden_size: size of the last dimension.
        eps: added to the variance.
        bias: as in Liger: there is a bias either way, drawn at random if True and zero otherwise.
        init_fn: `"ones"` or `"zeros"`, for the weight.
        impl, mode, backend: Liger's kernels; not offered, so None.

    Raises:
        NotImplementedError: for kernels of Liger's.
        ValueError: for another `init_fn`.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        bias: bool = False,
        init_fn: str = "ones",
        impl: str | None = None,
        mode: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("impl", impl), ("mode", mode), ("backend", backend)):
            if value is not None:
                chooses = "None; evakernels.use_backend chooses"
                raise NotImplementedError(f"LigerLayerNorm: {name} is {value!r}; accepted: {chooses}")
        self.hidden_size, self.eps, self.variance_epsilon = hidden_size, eps, eps
        self.weight = _initial("LigerLayerNorm", init_fn, hidden_size)
        self.bias = nn.Parameter(torch.randn(hidden_size) if bias else torch.zeros(hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., hidden_size]` to the same shape."""
        return layer_norm(hidden_states, self.weight, self.bias, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"


class LigerRMSNorm(nn.Module):
    """Liger's `LigerRMSNorm`, by `evakernels.rms_norm`.

    Args:
        hidden_size: size of the last dimension.
        eps: added to the mean square.
        offset: added to the weight; Gemma's is 1.
        casting_mode: `"llama"`, `"gemma"` or `"none"`, the same here: sums are float32 and the result is rounded once.
        init_fn: `"ones"` or `"zeros"`, for the weight.
        in_place, row_mode: accepted and without effect: nothing is written into gradients, and any rows are served.
        elementwise_affine: whether there is a weight.

    Raises:
        ValueError: for another `casting_mode` or `init_fn`.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 0.0,
        casting_mode: str = "llama",
        init_fn: str = "ones",
        in_place: bool = True,
        row_mode: Any = None,
        elementwise_affine: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if casting_mode not in _CASTING_MODES:
            accepted = ", ".join(map(repr, _CASTING_MODES))
            raise ValueError(f"{name}: casting_mode is {casting_mode!r}; accepted: {accepted}")
        weight = _initial(name, init_fn, hidden_size)
        self.register_parameter("weight", weight if elementwise_affine else None)
        self.elementwise_affine, self.variance_epsilon, self.offset = elementwise_affine, eps, offset
        self.casting_mode, self.in_place, self.row_mode = casting_mode, in_place, row_mode

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., hidden_size]` to the same shape."""
        return rms_norm(hidden_states, self._scale(), self.variance_epsilon)

    def _scale(self) -> Tensor | None:
        if self.weight is None or not self.offset:
            return self.weight
        return self.weight.to(accumulation_dtype(self.weight)) + self.offset  # 16 bits would round the sum

    def extra_repr(self) -> str:
        shape = None if self.weight is None else tuple(self.weight.shape)
        return f"weight_shape={shape}, eps={self.variance_epsilon}, offset={self.offset}"


class LigerFusedAddRMSNorm(LigerRMSNorm):
    """Liger's `LigerFusedAddRMSNorm`, by `evakernels.add_rms_norm`. Arguments as of `LigerRMSNorm`."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 0.0,
        casting_mode: str = "llama",
        init_fn: str = "ones",
        in_place: bool = False,
    ) -> None:
        super().__init__(hidden_size, eps, offset, casting_mode, init_fn, in_place)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """`[B, ..., hidden_size]` twice to the norm of their sum, and the sum."""
        return add_rms_norm(residual, hidden_states, self._scale(), eps=self.variance_epsilon)


class LigerSwiGLUMLP(nn.Module):
    """Liger's `LigerSwiGLUMLP`: `down_proj(silu(gate_proj(x)) * up_proj(x))`, by `evakernels.swiglu`.

    Args:
        config: with `hidden_size`, `intermediate_size` and `hidden_act`, as models of transformers have it.
        intermediate_size: in the place of the config's.

    Raises:
        ValueError: for another activation than silu.
    """

    def __init__(self, config: Any, intermediate_size: int | None = None) -> None:
        super().__init__()
        self.config, self.hidden_size = config, config.hidden_size
        self.intermediate_size = config.intermediate_size if intermediate_size is None else intermediate_size
        if config.hidden_act not in ("silu", "swish"):
            raise ValueError(f"LigerSwiGLUMLP: hidden_act is {config.hidden_act!r}; accepted: 'silu', 'swish'")
        self.gate_proj = Linear(self.hidden_size, self.intermediate_size, bias=False)
        self.up_proj = Linear(self.hidden_size, self.intermediate_size, bias=False)
        self.down_proj = Linear(self.intermediate_size, self.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden_size]` to the same shape."""
        y: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return y
