"""Layers for Hugging Face's `kernels`: `kernelize` gives their forwards to the layers of a model.

They have no state: a forward reads the parameters of the layer that it replaces.
"""

from typing import Any

from torch import Tensor, nn

from ..ops import gelu, layer_norm, rms_norm, rope_attention, swiglu


class LayerNorm(nn.Module):
    """Forward of `nn.LayerNorm` over the last dimension."""

    has_backward = True
    can_torch_compile = True
    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        if len(self.normalized_shape) != 1:
            return nn.functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        return layer_norm(input, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Forward of transformers' `LlamaRMSNorm`."""

    has_backward = True
    can_torch_compile = True
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class GELU(nn.Module):
    """Forward of `nn.GELU`, and of transformers' exact `GELUActivation`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, approximate=getattr(self, "approximate", "none"))


class SwiGLUMLP(nn.Module):
    """Forward of transformers' `LlamaMLP`; with another activation than SiLU without the op."""

    has_backward = True
    can_torch_compile = True
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        activation: Any = getattr(self, "act_fn", None)
        is_silu = activation is None or type(activation).__name__ in ("SiLU", "SiLUActivation")
        out: Tensor = self.down_proj(swiglu(gate, up) if is_silu else activation(gate) * up)
        return out


class RotaryAttention(nn.Module):
    """Forward of transformers' `DINOv3ViTAttention`; rotates patch tokens, not the class token and registers.

    Raises `NotImplementedError` for an attention mask and for attention dropout.
    """

    has_backward = True
    can_torch_compile = True
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int
    scaling: float
    dropout: float
    is_causal: bool

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is not None:
            raise NotImplementedError("RotaryAttention: attention_mask must be None, got a tensor")
        if self.training and self.dropout:
            raise NotImplementedError(f"RotaryAttention: dropout must be 0.0 in training, got {self.dropout}")
        cos = sin = None
        prefix = 0
        if position_embeddings is not None:
            cos, sin = (table[:, : self.head_dim // 2] for table in position_embeddings)
            prefix = hidden_states.shape[1] - len(cos)
        q, k, v = (
            layer(hidden_states).unflatten(-1, (-1, self.head_dim)) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        causal = kwargs.get("is_causal")
        causal = bool(self.is_causal if causal is None else causal)
        options: dict[str, Any] = {"num_prefix": prefix, "interleaved": False, "causal": causal, "scale": self.scaling}
        out = rope_attention(q, k, v, cos, sin, **options)
        projected: Tensor = self.o_proj(out.flatten(2))
        return projected, None
