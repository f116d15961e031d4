"""Rules for transformers: CLIP, SigLIP, SigLIP2, DINOv3, and what reads like Llama's MLP and RMSNorm in any model."""

from typing import Any

import torch
from torch import Tensor

from evakernels.dropin._gate import serves
from evakernels.dropin._rule import Rule
from evakernels.dropin._serve import add, add_norm, gated, own_norm_parameters
from evakernels.dropin._swap import Swapped
from evakernels.dropin.torch_modules import GELU, by_silu
from evakernels.ops import rms_norm, rope_attention
from evakernels.ops.rope_attention import MAX_PREFIX

ROLES = {
    "transformers.activations.SiLUActivation": "silu",
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayerScale": "layer_scale",
    "transformers.models.dinov3_vit.modeling_dinov3_vit.Dinov3ViTDropPath": "drop_path",
}


class RMSNorm(Swapped):
    """Llama's."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if serves("rms_norm", hidden_states, forced=self.is_forced) and self.weight.dtype == hidden_states.dtype:
            parameters = own_norm_parameters(self, hidden_states)
            if parameters is not None:
                return rms_norm(hidden_states, parameters[0], parameters[2])
        y: Tensor = super().forward(hidden_states)
        return y


class GatedMLP(Swapped):
    """Llama's."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.act_fn, forced=self.is_forced))
        return y


# --- attention ------------------------------------------------------------------------------------------------------

_UNSERVED = ("output_attentions", "position_bias", "softcap")
"""Options of a call that transformers' scaled dot product attention takes or refuses."""


class _Attention(Swapped):
    """What the attention modules share: those that ask for torch's scaled dot product attention are served."""

    def _is_fused(self, op: str, x: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> bool:
        return (
            attention_mask is None
            and self.config._attn_implementation == "sdpa"
            and not (self.training and self.dropout > 0)
            and not any(options.get(name) for name in _UNSERVED)
            and serves(op, x, of_product=True, forced=self.is_forced)
            and x.dim() == 3
        )

    def _is_causal(self, options: dict[str, Any]) -> bool:
        causal = options.get("is_causal")
        return bool(self.is_causal if causal is None else causal)

    def _attend(self, x: Tensor, **options: Any) -> Tensor:
        """`[B, N, C]`, in front of the output projection."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return rope_attention(q, k, v, **options).flatten(2)


def _unrotated() -> str:
    return "attention_training" if torch.is_grad_enabled() else "attention"


class CLIPAttention(_Attention):
    """CLIP's, whose caller says whether it is causal."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if self._is_fused(_unrotated(), hidden_states, attention_mask, kwargs):
            out = self._attend(hidden_states, causal=self._is_causal(kwargs), scale=self.scale)
            return self.out_proj(out), None
        return super().forward(hidden_states, attention_mask, **kwargs)


class SiglipAttention(_Attention):
    """SigLIP's, whose caller doesn't."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if self._is_fused(_unrotated(), hidden_states, attention_mask, {}):
            out = self._attend(hidden_states, causal=self._is_causal({}), scale=self.scale)
            return self.out_proj(out), None
        return super().forward(hidden_states, attention_mask, **kwargs)


class DINOv3Attention(_Attention):
    """DINOv3's, which rotates the patches behind class token and registers."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        if position_embeddings is not None and self._is_fused("rope_attention", hidden_states, attention_mask, kwargs):
            cos, sin = position_embeddings
            prefix, pairs = hidden_states.shape[1] - sin.shape[-2], self.head_dim // 2
            if cos.dim() == 2 and 0 <= prefix <= MAX_PREFIX:
                out = self._attend(
                    hidden_states,
                    cos=cos[:, :pairs],
                    sin=sin[:, :pairs],
                    num_prefix=prefix,
                    interleaved=False,
                    causal=self._is_causal(kwargs),
                    scale=self.scaling,
                )
                return self.o_proj(out), None
        return super().forward(hidden_states, attention_mask, position_embeddings, **kwargs)


# --- layers ---------------------------------------------------------------------------------------------------------


class EncoderLayer(Swapped):
    """That of CLIP and SigLIP."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        branch, _ = self.self_attn(
            hidden_states=self.layer_norm1(hidden_states), attention_mask=attention_mask, **kwargs
        )
        y, x = add_norm(hidden_states, branch, self.layer_norm2, forced=self.is_forced)
        return add(x, self.mlp(y))


class DINOv3Layer(Swapped):
    """DINOv3's, with layer scale and stochastic depth."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        branch, _ = self.attention(
            self.norm1(hidden_states), attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
        )
        y, x = add_norm(hidden_states, branch, self.norm2, self.layer_scale1, self.drop_path, forced=self.is_forced)
        return add(x, self.mlp(y), self.layer_scale2, self.drop_path)


_MODELS = "transformers.models"
_CLIP, _SIGLIP, _SIGLIP2 = (f"{_MODELS}.{name}.modeling_{name}" for name in ("clip", "siglip", "siglip2"))
_DINOV3, _LLAMA = f"{_MODELS}.dinov3_vit.modeling_dinov3_vit", f"{_MODELS}.llama.modeling_llama"
_SDPA = ("transformers.integrations.sdpa_attention.sdpa_attention_forward",)

RULES = (
    Rule(GELU, "transformers.activations.GELUTanh", "gelu", "gelu"),
    Rule(GELU, "transformers.activations.NewGELUActivation", "gelu", "gelu"),
    Rule(RMSNorm, f"{_LLAMA}.LlamaRMSNorm", "rms_norm", "rms_norm", any_class=True),
    Rule(GatedMLP, f"{_LLAMA}.LlamaMLP", "swiglu", "swiglu", reason=by_silu, any_class=True),
    Rule(CLIPAttention, f"{_CLIP}.CLIPAttention", "rope_attention", "attention", helpers=_SDPA),
    Rule(SiglipAttention, f"{_SIGLIP}.SiglipAttention", "rope_attention", "attention", helpers=_SDPA),
    Rule(SiglipAttention, f"{_SIGLIP2}.Siglip2Attention", "rope_attention", "attention", helpers=_SDPA),
    Rule(
        DINOv3Attention,
        f"{_DINOV3}.DINOv3ViTAttention",
        "rope_attention",
        "rope_attention",
        helpers=(*_SDPA, f"{_DINOV3}.apply_rotary_pos_emb", f"{_DINOV3}.rotate_half"),
    ),
    Rule(EncoderLayer, f"{_CLIP}.CLIPEncoderLayer", "add_layer_norm", "add_norm", any_class=True),
    Rule(EncoderLayer, f"{_SIGLIP}.SiglipEncoderLayer", "add_layer_norm", "add_norm", any_class=True),
    Rule(DINOv3Layer, f"{_DINOV3}.DINOv3ViTLayer", "add_layer_norm", "scaled_add_norm"),
)
