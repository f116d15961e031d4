"""Replacements for transformers: CLIP, SigLIP, SigLIP2, DINOv3; Llama's MLP and RMSNorm and CLIP's layer in any model;
and the attention of all models that call its `AttentionInterface`, through that interface."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import refuse
from ..ops import rms_norm, rope_attention
from ..ops.rope_attention import MAX_PREFIX
from ._dispatch import attention_op, dispatches_to
from ._fused import add, add_norm, apply_gate, gated_mlp, read_norm
from ._replacement import Call, Replacement
from ._swap import AcceleratedModule
from .torch_modules import GELU, DropPath, LayerScale, QuickGELU, SiLU, require_silu


class RMSNorm(AcceleratedModule):
    """Llama's RMSNorm."""

    def forward(self, hidden_states: Tensor) -> Any:
        if dispatches_to("rms_norm", hidden_states, forced=self.is_forced) and self.weight.dtype == hidden_states.dtype:
            parameters = read_norm(self, hidden_states)
            if parameters is not None:
                return rms_norm(hidden_states, parameters[0], parameters[2])
        return super().forward(hidden_states)


class GatedMLP(AcceleratedModule):
    """Llama's gated MLP."""

    def forward(self, x: Tensor) -> Any:
        projections = self.gate_proj, self.up_proj
        out = gated_mlp(x, projections, self.down_proj, self.act_fn, forced=self.is_forced)
        if out is not None:
            return out
        return self.down_proj(apply_gate(self.gate_proj(x), self.up_proj(x), self.act_fn, forced=self.is_forced))


class ExactGELU(GELU):
    """The exact GELU of DINOv3 and ViT."""

    approximate = "none"


# --- attention ------------------------------------------------------------------------------------------------------


class HookedAttention(AcceleratedModule):
    """Attention with its own forward; its "sdpa" call through `AttentionInterface` reaches `_attend`."""


_INTERFACE = "transformers.modeling_utils.AttentionInterface"
_ARGUMENTS = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs"}
_sdpa: Callable[..., Any] | None = None
_unsupported: frozenset[str] = frozenset()
"""Options of transformers' scaled dot product attention that the op lacks."""


def prepare() -> None:
    """Registers `_attend` as "sdpa", unless another function than transformers' own is registered."""
    global _sdpa, _unsupported
    interface: Any = getattr(sys.modules.get("transformers.modeling_utils"), "AttentionInterface", None)
    current = None if interface is None else interface().get("sdpa")
    if current is not None and current.__module__.startswith("transformers."):
        _unsupported = frozenset(inspect.signature(current).parameters) - _ARGUMENTS | {"output_attentions", "softcap"}
        _sdpa = current
        interface.register("sdpa", _attend)


def calls_interface(cls: Any) -> bool:
    """Whether the forward of a class calls transformers' common attention interface."""
    forward = inspect.unwrap(cls.forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    interface = forward.__globals__.get("ALL_ATTENTION_FUNCTIONS") if "ALL_ATTENTION_FUNCTIONS" in names else None
    return interface is not None and interface.get("sdpa") is _attend


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """`[B, N, H, D]` for queries, keys and values `[B, H, N, D]`; by the op for an accelerated module."""
    plain = (attention_mask is None or refuse("mask")) and (dropout == 0 or refuse("dropout"))
    plain = isinstance(module, HookedAttention) and plain and not _has_other_options(options)
    if plain and _can_fuse(module, query, key, value):
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        q, k, v = (part.transpose(1, 2) for part in (query, key, value))
        return rope_attention(q, k, v, causal=bool(causal), scale=scaling), None
    assert _sdpa is not None
    result: tuple[Tensor, Any] = _sdpa(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
    )
    return result


def _has_other_options(options: dict[str, Any]) -> bool:
    given = [name for name in _unsupported if options.get(name) is not None and options[name] is not False]
    return bool(given) and not refuse(", ".join(sorted(given)))


def _can_fuse(module: Any, query: Tensor, key: Tensor, value: Tensor) -> bool:
    fits = query.dim() == 4 and query.dtype == key.dtype == value.dtype
    fits = fits and key.shape == value.shape == (query.shape[0], key.shape[1], *query.shape[2:])  # heads may share keys
    forced = module.is_forced
    return (fits or refuse("shape or dtype")) and dispatches_to(attention_op(), query, after_linear=True, forced=forced)


def _require_sdpa(module: Any) -> str | None:
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return None if chosen == "sdpa" else f"its attn_implementation is {chosen}, not sdpa"


class DINOv3Attention(HookedAttention):
    """DINOv3's attention; the op rotates the patches behind class token and registers."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        if position_embeddings is not None and self._is_fused(hidden_states, attention_mask, kwargs):
            cos, sin = position_embeddings
            prefix, pairs = hidden_states.shape[1] - sin.shape[-2], self.head_dim // 2
            if cos.dim() == 2 and 0 <= prefix <= MAX_PREFIX:
                projections = self.q_proj, self.k_proj, self.v_proj
                q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)) for p in projections)
                causal = kwargs.get("is_causal")
                out = rope_attention(
                    q,
                    k,
                    v,
                    cos=cos[:, :pairs],
                    sin=sin[:, :pairs],
                    num_prefix=prefix,
                    interleaved=False,
                    causal=bool(self.is_causal if causal is None else causal),
                    scale=self.scaling,
                )
                return self.o_proj(out.flatten(2)), None
        return super().forward(hidden_states, attention_mask, position_embeddings, **kwargs)

    def _is_fused(self, x: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> bool:
        return (
            (attention_mask is None or refuse("mask"))
            and (self.config._attn_implementation == "sdpa" or refuse("attn_implementation"))
            and (not (self.training and self.dropout > 0) or refuse("dropout"))
            and not _has_other_options(options)
            and dispatches_to("rope_attention", x, after_linear=True, forced=self.is_forced)
            and x.dim() == 3
        )


# --- layers ---------------------------------------------------------------------------------------------------------


class EncoderLayer(AcceleratedModule):
    """The encoder layer of CLIP and SigLIP."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        branch, _ = self.self_attn(self.layer_norm1(hidden_states), *args, **kwargs)
        y, x = add_norm(hidden_states, branch, self.layer_norm2, forced=self.is_forced)
        return add(x, self.mlp(y))


class EncoderLayerWithTuple(EncoderLayer):
    """The encoder layer of CLIP and SigLIP before transformers 5, which returns a tuple."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (super().forward(hidden_states, *args, **kwargs),)


class DINOv3Layer(AcceleratedModule):
    """DINOv3's layer, with layer scale and stochastic depth."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        branch, _ = self.attention(self.norm1(hidden_states), *args, **kwargs)
        y, x = add_norm(hidden_states, branch, self.norm2, self.layer_scale1, self.drop_path, forced=self.is_forced)
        return add(x, self.mlp(y), self.layer_scale2, self.drop_path)


# --- arguments for the comparison -------------------------------------------------------------------------------------


def _masked_calls(module: Any, x: Tensor) -> list[Call]:
    mask = torch.randn_like(x @ x.mT)[:, None]
    if "causal_attention_mask" in inspect.signature(type(module).forward).parameters:  # CLIP before transformers 5
        return [((x, first), {"causal_attention_mask": second}) for first in (None, mask) for second in (None, mask)]
    return [((x, None), {}), ((x, mask), {})]


def _rotary_calls(module: Any, x: Tensor) -> list[Call]:
    attention = getattr(module, "attention", module)
    angles = x.new_empty(x.shape[1] - 3, attention.head_dim // 2).uniform_(-3, 3).repeat(1, 2)
    return [(args, {"position_embeddings": (angles.cos(), angles.sin())}) for args, _ in _masked_calls(module, x)]


_MODELS = "transformers.models"
_CLIP, _SIGLIP = (f"{_MODELS}.{name}.modeling_{name}" for name in ("clip", "siglip"))
_DINOV3, _LLAMA = f"{_MODELS}.dinov3_vit.modeling_dinov3_vit", f"{_MODELS}.llama.modeling_llama"

_ENCODER_LAYER = "layer_norm1", "self_attn", "layer_norm2", "mlp"

REPLACEMENTS = (
    Replacement(SiLU, "transformers.activations.SiLUActivation", role="silu"),
    Replacement(LayerScale, f"{_DINOV3}.DINOv3ViTLayerScale", role="layer_scale"),
    Replacement(DropPath, f"{_DINOV3}.Dinov3ViTDropPath", role="drop_path"),
    Replacement(ExactGELU, "transformers.activations.GELUActivation", "exact_gelu"),
    Replacement(GELU, "transformers.activations.GELUTanh", "gelu"),
    Replacement(GELU, "transformers.activations.NewGELUActivation", "gelu"),
    Replacement(QuickGELU, "transformers.activations.QuickGELUActivation", "quick_gelu"),
    Replacement(RMSNorm, f"{_LLAMA}.LlamaRMSNorm", "rms_norm", "rms_norm", attributes=("weight", "variance_epsilon")),
    Replacement(
        GatedMLP,
        f"{_LLAMA}.LlamaMLP",
        "swiglu",
        reason=require_silu,
        attributes=("gate_proj", "up_proj", "down_proj", "act_fn"),
    ),
    Replacement(
        DINOv3Attention, f"{_DINOV3}.DINOv3ViTAttention", "rope_attention", reason=_require_sdpa, calls=_rotary_calls
    ),
    Replacement(EncoderLayer, f"{_CLIP}.CLIPEncoderLayer", "add_norm", attributes=_ENCODER_LAYER, calls=_masked_calls),
    Replacement(EncoderLayer, f"{_SIGLIP}.SiglipEncoderLayer", "add_norm", calls=_masked_calls),
    Replacement(EncoderLayerWithTuple, f"{_CLIP}.CLIPEncoderLayer", "add_norm", calls=_masked_calls),
    Replacement(EncoderLayerWithTuple, f"{_SIGLIP}.SiglipEncoderLayer", "add_norm", calls=_masked_calls),
    Replacement(DINOv3Layer, f"{_DINOV3}.DINOv3ViTLayer", "scaled_add_norm", calls=_rotary_calls),
    Replacement(HookedAttention, _INTERFACE, "attention", reason=_require_sdpa, hook=calls_interface),
)
