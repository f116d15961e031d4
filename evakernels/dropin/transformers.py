"""Replacements for transformers: CLIP, SigLIP, SigLIP2, DINOv3; Llama's MLP and RMSNorm and CLIP's layer in any model;
the attention of all models that call its `AttentionInterface`, through that interface; encoders that run without
padding, and vision towers of packed images."""

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..nn.layers import RotaryAttention
from ..ops import packed_attention, rms_norm, rope_attention
from ..ops.rope_attention import MAX_PREFIX
from ..packing import Packing
from ._dispatch import attention_op, dispatches_to, is_plain
from ._fused import add, add_norm, apply_gate, gated_mlp, read_norm, role
from ._packing import Layers, padded_masks, read_mask, without_padding
from ._replacement import Call, Replacement, draw
from ._swap import LIVE, AcceleratedModule
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
        if role(self.act_fn) != "silu":  # its own code calls a hooked activation before `up_proj`
            return super().forward(x)
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

    def _can_run(self, op: str, x: Tensor, dropout: float, options: dict[str, Any]) -> bool:
        return (
            dispatches_to(op, x, after_linear=True, forced=self.is_forced)
            and self.config._attn_implementation == "sdpa"
            and not (self.training and dropout > 0)
            and not _has_other_options(options)
        )


_INTERFACE = "transformers.modeling_utils.AttentionInterface"
_ARGUMENTS = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs"}
_sdpa: Callable[..., Any] | None = None
_unsupported: frozenset[str] = frozenset()
"""Options of transformers' scaled dot product attention that the op lacks."""


def prepare() -> None:
    """Registers `_attend` as "sdpa", unless another function than transformers' own is registered."""
    global _sdpa, _unsupported
    current = _registered()
    if current is not None and current.__module__.startswith("transformers."):
        _unsupported = frozenset(inspect.signature(current).parameters) - _ARGUMENTS | {"output_attentions", "softcap"}
        _sdpa = current
        sys.modules["transformers.modeling_utils"].AttentionInterface.register("sdpa", _attend)


def release() -> None:
    """Registers transformers' own function as "sdpa" again, if no replaced module is left that calls `_attend`."""
    if _registered() is _attend and not any(isinstance(module, HookedAttention) for module in LIVE):
        sys.modules["transformers.modeling_utils"].AttentionInterface.register("sdpa", _sdpa)


def _registered() -> Any:
    interface: Any = getattr(sys.modules.get("transformers.modeling_utils"), "AttentionInterface", None)
    return None if interface is None else interface().get("sdpa")


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
    attention_mask: Tensor | Packing | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """`[B, N, H, D]` for queries, keys and values `[B, H, N, D]`; by the op for an accelerated module."""
    if isinstance(attention_mask, Packing):
        if dropout or _has_other_options(options):
            raise NotImplementedError(f"{type(module).__name__} must have no dropout and no position bias if packed")
        q, k, v = (part.transpose(1, 2) for part in (query, key, value))
        return attention_mask.attend(q, k, v, scale=scaling), None
    plain = attention_mask is None and dropout == 0
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
    return any(options.get(name) is not None and options[name] is not False for name in _unsupported)


def _can_fuse(module: Any, query: Tensor, key: Tensor, value: Tensor) -> bool:
    fits = query.dim() == 4 and query.dtype == key.dtype == value.dtype
    fits = fits and key.shape == value.shape == (query.shape[0], key.shape[1], *query.shape[2:])  # heads may share keys
    forced = module.is_forced
    return fits and dispatches_to(attention_op(), query, after_linear=True, forced=forced)


def _require_sdpa(module: Any) -> str | None:
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if chosen != "sdpa":
        return f"its attn_implementation is {chosen}, not sdpa"
    return None if _registered() in (_attend, None) else "another function is registered as sdpa"


class DINOv3Attention(HookedAttention):
    """DINOv3's attention; the op rotates the patches, but not the class token and registers before them."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        if (
            position_embeddings is not None
            and attention_mask is None
            and self._can_run("rope_attention", hidden_states, self.dropout, kwargs)
            and hidden_states.dim() == 3
        ):
            prefix = hidden_states.shape[1] - position_embeddings[1].shape[-2]
            if position_embeddings[0].dim() == 2 and 0 <= prefix <= MAX_PREFIX:
                forward: Any = RotaryAttention.forward
                return forward(self, hidden_states, None, position_embeddings, **kwargs)
        return super().forward(hidden_states, attention_mask, position_embeddings, **kwargs)


class RotatedAttention(HookedAttention):
    """Attention of packed images with rotary embedding: one op rotates and attends."""

    def _attend_packed(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, position_embeddings: tuple[Tensor, Tensor]
    ) -> Tensor:
        """`[T, C]` for the tokens `[T, C]` and tables `[T, D]`, which hold each angle twice."""
        parts: dict[str, Any] = self._modules
        if "qkv" in parts:
            q, k, v = parts["qkv"](x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        else:
            names = ("q_proj", "k_proj", "v_proj") if "q_proj" in parts else ("q", "k", "v")
            q, k, v = (parts[name](x).unflatten(-1, (self.num_heads, -1)) for name in names)
        if "q_norm" in parts:
            q, k = parts["q_norm"](q), parts["k_norm"](k)
        cos, sin = (table[:, : q.shape[-1] // 2] for table in position_embeddings)
        out = packed_attention(
            q,
            k,
            v,
            cu_seqlens,
            max_seqlen=max_seqlen,
            cos=cos,
            sin=sin,
            positions=torch.arange(x.shape[0], device=x.device),
            causal=False,
            interleaved=False,
            scale=self.scaling,
        )
        last = next(parts[name] for name in ("proj", "out_proj", "o_proj") if name in parts)
        projected: Tensor = last(out.flatten(1))
        return projected


class PackedVisionAttention(RotatedAttention):
    """The attention of Qwen2-VL and of towers made after it, which loops over the images of a batch."""

    returns_weights = False

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Any:
        if position_embeddings is None or not self._is_fused(hidden_states, position_embeddings[0], kwargs):
            kwargs |= {"position_embeddings": position_embeddings}
            kwargs |= {} if max_seqlen is None else {"max_seqlen": max_seqlen}
            return super().forward(hidden_states, cu_seqlens, **kwargs)
        longest = hidden_states.shape[0]
        if not torch.compiler.is_compiling():  # which would break the graph
            longest = int(cu_seqlens.diff().max())
        out = self._attend_packed(hidden_states, cu_seqlens, longest, position_embeddings)
        return (out, [None] * (cu_seqlens.shape[0] - 1)) if self.returns_weights else out

    def _is_fused(self, x: Tensor, table: Tensor, options: dict[str, Any]) -> bool:
        if not self._can_run("packed_attention", x, self.attention_dropout, options):
            return False
        return x.dim() == 2 and x.numel() > 0 and not table.requires_grad


class PackedVisionAttentionWithWeights(PackedVisionAttention):
    """The same with a list of weights, None for each image, next to the output."""

    returns_weights = True


class PixtralAttention(RotatedAttention):
    """Pixtral's attention, in an encoder that has packed the images."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Packing | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        if isinstance(attention_mask, Packing) and position_embeddings is not None:
            bounds = attention_mask.cu_seqlens, attention_mask.max_seqlen
            return self._attend_packed(hidden_states[0], *bounds, position_embeddings).unsqueeze(0), None
        return super().forward(hidden_states, attention_mask, position_embeddings, **kwargs)


# --- layers ---------------------------------------------------------------------------------------------------------


class EncoderLayer(AcceleratedModule):
    """The encoder layer of CLIP and SigLIP."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        options = {"attention_mask": attention_mask, **dict(zip(("causal_attention_mask",), args, strict=False))}
        branch, _ = self.self_attn(hidden_states=self.layer_norm1(hidden_states), **options, **kwargs)
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


# --- encoders ---------------------------------------------------------------------------------------------------------

_REAL_ENDS = "pooled_tokens_are_real"
_HARMLESS = ("is_causal", "position_ids", "position_embeddings", _REAL_ENDS)
"""Arguments that layers may have besides a `Packing`: it has their meaning, or there is no padding."""


class Encoder(AcceleratedModule):
    """A list of layers that runs without padding."""

    layers_name = "layers"
    pooled: int | None = None
    """Index of a token that the model may pool, so that it must be real."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        original_forward: Any = super().forward
        if torch.compiler.is_compiling():
            return original_forward(*args, **kwargs)
        first, *names = _parameter_names(original_forward.__func__)
        arguments = {**dict(zip((first, *names), args, strict=False)), **kwargs}
        x, mask = arguments.pop(first), arguments.pop("attention_mask", None)
        packing = self._pack(x, mask, arguments)
        arguments.pop(_REAL_ENDS, None)
        if packing is None:
            return original_forward(*args, **kwargs)
        out = original_forward(**{first: packing.pack(x).unsqueeze(0), "attention_mask": packing}, **arguments)
        out.last_hidden_state = packing.unpack(out.last_hidden_state.squeeze(0))
        return out

    def _pack(self, x: Tensor, mask: Any, options: dict[str, Any]) -> Packing | None:
        others = [n for n, value in options.items() if n not in _HARMLESS and value is not None and value is not False]
        plain = mask is not None and not others
        if not plain or not _LAYERS[self.layers_name].can_pack(self, x):
            return None
        packing = read_mask(mask, x, self.pooled)
        if packing is None or (packing.rows is not None and options.get("position_embeddings") is not None):
            return None
        return packing


class ClipEncoder(Encoder):
    """CLIP's encoder, which runs packed if its text model has found that no padding is pooled."""

    def _pack(self, x: Tensor, mask: Any, options: dict[str, Any]) -> Packing | None:
        is_read = mask is not None and not options.get(_REAL_ENDS)
        return None if is_read else super()._pack(x, mask, options)


class ClipTextModel(AcceleratedModule):
    """CLIP's text model, which pools the end token of a caption."""

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if not torch.compiler.is_compiling() and attention_mask is not None and input_ids is not None:
            kwargs |= {_REAL_ENDS: True} if self._has_real_ends(input_ids, attention_mask) else {}
        return super().forward(input_ids, attention_mask, *args, **kwargs)

    def _has_real_ends(self, tokens: Tensor, mask: Tensor) -> bool:
        if not is_plain(tokens) or not is_plain(mask) or mask.shape != tokens.shape:
            return False
        end = self.config.eos_token_id
        ends = tokens if end == 2 else (tokens == end).int()
        return bool(mask.gather(1, ends.argmax(1, keepdim=True)).all())


def _takes_any(cls: Any) -> bool:
    """Whether a class is CLIP's text model with a forward that passes further arguments to its encoder."""
    if cls.__name__ != "CLIPTextModel" or cls.__module__ != _CLIP:
        return False
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(cls.forward).parameters.values())


class SiglipEncoder(Encoder):
    """SigLIP's encoder; the text model pools the last token."""

    @property
    def pooled(self) -> int | None:  # type: ignore[override]
        return -1 if hasattr(self.config, "vocab_size") else None


class BertEncoder(Encoder):
    """The encoder of BERT and of models made after it, which pool the first token."""

    layers_name = "layer"
    pooled = 0


_BERTS = "Bert", "Roberta", "XLMRoberta", "XLMRobertaXL", "Camembert"
_HEADS = "Model", "ForSequenceClassification", "ForMultipleChoice"
_PADDING_UNREAD = {
    # They pool the first token, and their heads read it alone.
    *(f"transformers.{name}{head}" for name in _BERTS for head in _HEADS),
    *("transformers.BertForNextSentencePrediction", "transformers.ChineseCLIPTextModel"),
    # They pool a token that the encoder has found to be real.
    *("transformers.CLIPTextModel", "transformers.CLIPTextModelWithProjection", "transformers.CLIPTextTransformer"),
    *(f"transformers.{name}Text{kind}" for name in ("Siglip", "Siglip2") for kind in ("Model", "Transformer")),
    # Its pooling head masks padding. The classifier averages real tokens.
    *("transformers.Siglip2VisionModel", "transformers.Siglip2VisionTransformer"),
    "transformers.Siglip2ForImageClassification",
    # They compare pooled tokens.
    *(f"transformers.{name}Model" for name in ("CLIP", "ChineseCLIP", "Siglip", "Siglip2")),
    # Its poolers take the mask.
    *("open_clip.HFTextEncoder", "open_clip.CustomTextCLIP"),
}
"""Classes that read no padded token of their encoder. Others, such as heads for each token, keep the padding."""


def _reads_no_padding(cls: type) -> bool:
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}" in _PADDING_UNREAD


@cache
def _parameter_names(forward: Callable[..., Any]) -> list[str]:
    return [parameter for parameter in inspect.signature(forward).parameters if parameter != "self"]


# --- arguments for the comparison -------------------------------------------------------------------------------------


def _masked_calls(module: Any, x: Tensor) -> list[Call]:
    mask = draw(x.shape[0], 1, x.shape[1], x.shape[1])
    if "causal_attention_mask" in inspect.signature(type(module).forward).parameters:  # CLIP before transformers 5
        return [((x, first), {"causal_attention_mask": second}) for first in (None, mask) for second in (None, mask)]
    return [((x, None), {}), ((x, mask), {})]


def _rotary_calls(module: Any, x: Tensor) -> list[Call]:
    attention = getattr(module, "attention", module)
    angles = draw(x.shape[1] - 3, attention.head_dim // 2).repeat(1, 2)
    return [(args, {"position_embeddings": (angles.cos(), angles.sin())}) for args, _ in _masked_calls(module, x)]


def _vision_calls(module: Any, x: Tensor) -> list[Call]:
    """Three images with their angles."""
    tokens, bounds = x.flatten(0, 1), torch.tensor([0, 12, 15, 24], dtype=torch.int32)
    options = {"position_embeddings": _tables(module, tokens)}
    return [((tokens, bounds), {**options, **more}) for more in ({}, {"max_seqlen": 12})]


def _pixtral_calls(module: Any, x: Tensor) -> list[Call]:
    """One sample of three images, without mask for an attention alone."""
    tokens = x.flatten(0, 1).unsqueeze(0)
    images = torch.tensor([0] * 12 + [1] * 3 + [2] * 9)
    mask = x.new_zeros(24, 24).masked_fill(images != images.unsqueeze(1), torch.finfo(x.dtype).min)
    attention = module.layers[0].attention if hasattr(module, "layers") else module
    return [((tokens, mask[None, None]), {"position_embeddings": _tables(attention, tokens[0])})]


def _tables(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    angles = draw(tokens.shape[0], attention.head_dim // 2).repeat(1, 2)
    return angles.cos(), angles.sin()


def _encoder_calls(module: Any, x: Tensor) -> list[Call]:
    keys, additive, causal = padded_masks(x)
    options: list[dict[str, Any]] = [{}, {"is_causal": True}, {"use_cache": False}]
    more = {_REAL_ENDS: True} if type(module).__name__ == "CLIPEncoder" else {}
    names = _parameter_names(type(module).forward)
    flags = [name for name in ("output_attentions", "output_hidden_states") if name in names]  # before 4.57
    options += [dict.fromkeys(flags, False)] if flags else []
    cases = zip((keys, causal, additive, keys), options, strict=False)
    return [((x, mask), {**kwargs, **more}) for mask, kwargs in cases]


_MODELS = "transformers.models"
_CLIP, _SIGLIP = (f"{_MODELS}.{name}.modeling_{name}" for name in ("clip", "siglip"))
_DINOV3, _LLAMA = f"{_MODELS}.dinov3_vit.modeling_dinov3_vit", f"{_MODELS}.llama.modeling_llama"

_ENCODER_LAYER = "layer_norm1", "self_attn", "layer_norm2", "mlp"

_LAYERS = {name: Layers(name, HookedAttention, _require_sdpa) for name in ("layers", "layer")}


def _encoder(forward: type[Encoder], model: str, name: str) -> Replacement:
    return Replacement(
        forward,
        f"{_MODELS}.{model}.modeling_{model}.{name}",
        "packed_attention",
        tower=_LAYERS[forward.layers_name],
        holder=_reads_no_padding,
        calls=_encoder_calls,
        compared=without_padding,
    )


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
    *(
        Replacement(
            forward,
            f"{_MODELS}.qwen2_vl.modeling_qwen2_vl.VisionAttention",
            "packed_attention",
            reason=_require_sdpa,
            attributes=("config", "num_heads", "num_key_value_groups", "scaling"),
            calls=_vision_calls,
        )
        for forward in (PackedVisionAttention, PackedVisionAttentionWithWeights)
    ),
    Replacement(
        PixtralAttention,
        f"{_MODELS}.pixtral.modeling_pixtral.PixtralAttention",
        "packed_attention",
        reason=_require_sdpa,
        calls=_pixtral_calls,
    ),
    Replacement(
        Encoder,
        f"{_MODELS}.pixtral.modeling_pixtral.PixtralTransformer",
        "packed_attention",
        tower=_LAYERS["layers"],
        calls=_pixtral_calls,
    ),
    Replacement(ClipTextModel, f"{_CLIP}.CLIPTextModel", "packed_attention", hook=_takes_any),
    _encoder(ClipEncoder, "clip", "CLIPEncoder"),
    _encoder(SiglipEncoder, "siglip", "SiglipEncoder"),
    _encoder(SiglipEncoder, "siglip2", "Siglip2Encoder"),
    _encoder(BertEncoder, "bert", "BertEncoder"),
    _encoder(BertEncoder, "roberta", "RobertaEncoder"),
    _encoder(BertEncoder, "xlm_roberta", "XLMRobertaEncoder"),
    _encoder(BertEncoder, "xlm_roberta_xl", "XLMRobertaXLEncoder"),
    _encoder(BertEncoder, "camembert", "CamembertEncoder"),
    _encoder(BertEncoder, "chinese_clip", "ChineseCLIPTextEncoder"),
    Replacement(HookedAttention, _INTERFACE, "attention", reason=_require_sdpa, hook=calls_interface),
)
