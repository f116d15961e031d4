"""Replacements for timm: the EVA family, ViT, DINOv3 and the Perception Encoder share these modules."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._modes import is_observed
from ..nn import linear
from ..ops import rope_attention, token_dropout
from ..ops.rope_attention import MAX_PREFIX
from ..packing import Packing
from . import _pooling
from ._dispatch import attention_op, dispatches_to, is_tiny
from ._fused import add, add_norm, apply_gate, gated_mlp, may_drop, norm_add, role
from ._packing import Layers, padded_masks, read_mask, without_padding
from ._replacement import Call, Replacement, draw
from ._swap import AcceleratedModule
from .torch_modules import GELU, DropPath, LayerScale, QuickGELU, RMSNorm, require_1d, require_silu
from .torch_modules import LayerNorm as _LayerNorm


class LayerNorm(_LayerNorm):
    """timm's LayerNorm; its argument is `x`."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


# --- MLPs -----------------------------------------------------------------------------------------------------------


class SwiGLU(AcceleratedModule):
    """SwiGLU with two projections."""

    def forward(self, x: Tensor) -> Any:
        out = self._fuse(x, self.fc1_g, self.fc1_x)
        return self._finish(self.fc1_g(x), self.fc1_x(x)) if out is None else out

    def _fuse(self, x: Tensor, *projections: Any, gate_last: bool = False) -> Any:
        parts = projections, self.fc2, self.act, self.drop1, self.norm
        out = gated_mlp(x, *parts, gate_last=gate_last, forced=self.is_forced)
        return None if out is None else self.drop2(out)

    def _finish(self, gate: Tensor, up: Tensor) -> Any:
        hidden = apply_gate(gate, up, self.act, self.drop1, self.norm, forced=self.is_forced)
        return self.drop2(self.fc2(hidden))


class GluMlp(SwiGLU):
    """A gated MLP with one packed projection."""

    def forward(self, x: Tensor) -> Any:
        out = self._fuse(x, self.fc1, gate_last=self.gate_last)
        if out is not None:
            return out
        first, second = self.fc1(x).chunk(2, dim=-1)
        return self._finish(second, first) if self.gate_last else self._finish(first, second)


def _require_packed_silu(module: Any) -> str | None:
    return require_silu(module) if module.chunk_dim == -1 else "it is made of convolutions"


# --- attention ------------------------------------------------------------------------------------------------------


def _drop_defaults(attn_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """The options that differ from their defaults: timm has them since 1.0.16 and 1.0.26."""
    options: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}
    if is_causal is not False:  # under torch.fx it is a proxy
        options["is_causal"] = is_causal
    return options


class _Attention(AcceleratedModule):
    """Common parts of the attention modules."""

    def _is_fused(self, x: Tensor, rope: Tensor | None, attn_mask: Tensor | None, is_causal: bool) -> bool:
        op = attention_op() if rope is None else "rope_attention"
        norms: list[Any] = [self._modules[name] for name in ("q_norm", "k_norm") if name in self._modules]
        return (
            attn_mask is None
            and (self.selection is None or is_causal is False)
            and self.fused_attn
            and not may_drop(self.attn_drop)
            and not any(map(is_observed, norms))  # hooks see heads first
            and dispatches_to(op, x, after_linear=True, forced=self.is_forced)
        )

    def _project(self, queried: Tensor, x: Tensor) -> list[Tensor]:
        """q of the tokens `queried`, k and v, `[B, N, heads, head_dim]`; keys and values may have fewer heads."""
        parts: Any
        if self.qkv is None:
            parts = self.q_proj(queried), self.k_proj(x), self.v_proj(x)
        elif queried is not x:
            width, bias = int(self.proj.in_features), self._bias()
            (q, kv), biases = self.qkv.weight.split([width, 2 * width]), (None, None)
            if bias is not None:
                biases = bias.split([width, 2 * width])
            parts = linear(queried, q, biases[0]), *linear(x, kv, biases[1]).chunk(2, dim=-1)
        elif getattr(self, "q_bias", None) is None:
            parts = self.qkv(x).chunk(3, dim=-1)
        else:
            bias = self._bias()
            projected = self.qkv(x) + bias if self.qkv_bias_separate else linear(x, self.qkv.weight, bias)
            parts = projected.chunk(3, dim=-1)
        head_dim = parts[0].shape[-1] // self.num_heads
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in parts)
        norms: dict[str, Any] = self._modules
        return [norms["q_norm"](q), norms["k_norm"](k), v] if "q_norm" in norms else [q, k, v]

    def _bias(self) -> Tensor | None:
        if getattr(self, "q_bias", None) is None:
            bias: Tensor | None = self.qkv.bias
            return bias
        return torch.cat((self.q_bias, self.k_bias, self.v_bias))

    def _attend(self, x: Tensor, packing: Packing | None = None, **options: Any) -> Any:
        queried = self._select(x)
        q, k, v = self._project(queried, x)
        attend = rope_attention if packing is None else packing.attend
        out = attend(q.type_as(v), k.type_as(v), v, **options).flatten(2)
        norm, gate = self._modules.get("norm"), getattr(self, "gate", None)
        if norm is not None:
            out = norm(out)
        if gate is not None:
            out = out * gate(queried).sigmoid()
        return self.proj_drop(self.proj(out))


class Attention(_Attention):
    """Attention without rotary embedding."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        if isinstance(attn_mask, Packing):
            return self._attend(x, attn_mask)
        if self._is_fused(x, None, attn_mask, is_causal):
            return self._attend(x, causal=is_causal)
        return self._select(super().forward(x, **_drop_defaults(attn_mask, is_causal)))


def find_other_layouts(model: torch.nn.Module) -> dict[torch.nn.Module, str]:
    """The attentions of another layout than their tower's rotary table, with the reason against a replacement."""
    reasons = {}
    for tower in model.modules():
        rope = tower._modules.get("rope")
        if rope is None:
            continue
        half = getattr(rope, "rotate_half", "MRope" in type(rope).__name__)
        for part in tower.modules():
            if part is not rope and getattr(part, "rotate_half", half) != half:
                reasons[part] = f"its rotate_half is {not half}, unlike its rotary table"
    return reasons


class RotaryAttention(_Attention):
    """Attention with rotary embedding; tables may differ by head and by sample."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Any:
        if isinstance(attn_mask, Packing):
            return self._attend(x, attn_mask, **({} if rope is None else self._read_packed_table(attn_mask, rope)))
        if self._is_fused(x, rope, attn_mask, is_causal):
            rotation = {} if rope is None else self._read_table(x.shape[0], x.shape[1], rope)
            if rotation is not None:
                return self._attend(x, causal=is_causal, **rotation)
        return self._select(super().forward(x, rope=rope, **_drop_defaults(attn_mask, is_causal)))

    def _read_table(self, batch: int, tokens: int, rope: Tensor) -> dict[str, Any] | None:
        """`rope_attention`'s arguments for timm's table `[..., P, 2 * head_dim]`, which holds each angle twice."""
        prefix, half = self.num_prefix_tokens, bool(getattr(self, "rotate_half", False))
        patches, width = tokens - prefix, rope.shape[-1] // 2
        if (torch.is_grad_enabled() and rope.requires_grad) or prefix > MAX_PREFIX or rope.shape[-2] != patches:
            return None
        table, index = rope.detach(), None
        if table.dim() == 4:  # after patch dropout each sample has different rows
            if table.shape[0] != batch or table.shape[1] not in (1, self.num_heads):
                return None
            index = torch.arange(batch * patches, device=rope.device).view(batch, patches)
            table = table.transpose(0, 1).flatten(1, 2)
        if table.dim() == 3 and table.shape[0] == 1:
            table = table[0]
        if table.dim() not in (2, 3) or (table.dim() == 3 and table.shape[0] != self.num_heads):
            return None
        sin, cos = table.split(width, dim=-1)
        pairs = slice(0, width // 2) if half else slice(0, width, 2)
        return {
            "cos": cos[..., pairs],
            "sin": sin[..., pairs],
            "token_index": index,
            "num_prefix": prefix,
            "interleaved": not half,
        }

    def _read_packed_table(self, packing: Packing, rope: Tensor) -> dict[str, Any]:
        """`packed_attention`'s arguments for the table of the padded batch."""
        table = self._read_table(packing.batch, packing.length, rope)
        assert table is not None, "the tower packs no other tables"
        rows, prefix = table.pop("token_index"), table.pop("num_prefix")
        if rows is None:
            rows = torch.arange(packing.length - prefix, device=rope.device).expand(packing.batch, -1)
        rows = F.pad(rows, (prefix, 0), value=-1).flatten()
        return {**table, "positions": rows if packing.rows is None else rows[packing.rows]}


# --- blocks ---------------------------------------------------------------------------------------------------------


class _Block(AcceleratedModule):
    """Common parts of the blocks."""

    def _attention(self) -> Any:
        return self.attn if self.selection is None else _pooling.view(self.attn, selection=self.selection)


class Block(_Block):
    """A block of ViT, with or without relative positions, or of EVA, with layer scales as the block's parameters."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        if self.selection is None and is_tiny(x, self.is_forced):
            result: Tensor = super().forward(x, *args, **options)
            return result
        scales = (self.gamma_1, self.gamma_2) if hasattr(self, "gamma_1") else (self.ls1, self.ls2)
        branch = self._attention()(self.norm1(x), *args, **options)
        y, x = add_norm(self._select(x), branch, self.norm2, scales[0], self.drop_path1, forced=self.is_forced)
        return add(x, self.mlp(y), scales[1], self.drop_path2)


class PostNormBlock(_Block):
    """A block with norms after the branches."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        branch = self._attention()(x, *args, **options)
        x = norm_add(self._select(x), branch, self.norm1, self.drop_path1, forced=self.is_forced)
        return norm_add(x, self.mlp(x), self.norm2, self.drop_path2, forced=self.is_forced)


def block_gate(module: Any) -> str:
    """The gate of a block with or without a layer scale."""
    scales = (getattr(module, name, None) for name in ("gamma_1", "ls1", "ls_1"))
    scale = next((scale for scale in scales if scale is not None), None)
    return "add_norm" if scale is None or role(scale) == "identity" else "scaled_add_norm"


# --- towers ---------------------------------------------------------------------------------------------------------


def _require_one_token(module: Any) -> str | None:
    """Why the last block has to compute all tokens."""
    read = module.global_pool == "token" and getattr(module, "attn_pool", None) is None and module.num_prefix_tokens > 0
    return None if read else "all of its tokens are read"


def _shrink_sizes(module: Any) -> dict[int, int]:
    stem, prefix = module.patch_embed, module.num_prefix_tokens
    patches = getattr(stem, "num_patches", None)
    return {patches: 9, patches + prefix: 9 + prefix} if patches and getattr(stem, "flatten", True) else {}


_POOLING = _pooling.Pooling(
    ("blocks",), "norm", _Attention, ("forward_features", "forward_head", "pool"), _require_one_token
)


class Tower(AcceleratedModule):
    """A tower that pools its class token."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        tower: Any = _POOLING.shorten(self, _pooling.Selection()) if _POOLING.can_shorten(self, x) else self
        original_forward = super(Tower, tower).forward
        options = _drop_defaults(attn_mask, is_causal)
        if isinstance(attn_mask, torch.fx.Proxy):  # options that aren't given are proxies, too
            options = {name: value for name, value in options.items() if name in original_forward.__code__.co_varnames}
        return original_forward(x, **options)


_BLOCKS = Layers(
    "blocks",
    _Attention,
    lambda attention: None if attention.fused_attn else "fused_attn is off",
    other=("embeds", "norm_pre", "rope", "patch_drop", "attn_pool", "fc_norm", "head_drop", "head"),
)


class PackedTower(AcceleratedModule):
    """NaFlexVit; its blocks run on a packed batch if it pools their tokens itself."""

    method = "forward_features"
    pools = False

    def forward(self, *args: Any, **options: Any) -> Any:
        pools = bool(self.global_pool) or self.attn_pool is not None
        tower: Any = self if torch.compiler.is_compiling() else _pooling.view(self, pools=pools)
        return super(PackedTower, tower).forward(*args, **options)

    def forward_features(
        self,
        patches: Tensor,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Any:
        original: Any = super()
        inputs = patches, patch_coord, patch_valid, attn_mask
        is_padded = self.pools and patch_valid is not None and attn_mask is None
        if not is_padded or not _BLOCKS.can_pack(self, patches):
            return original.forward_features(*inputs)
        embeds: dict[str, Any] = self._forward_embeds(*inputs)
        rope = embeds.get("rope_embeds")
        is_fixed = rope is None or (isinstance(rope, Tensor) and not rope.requires_grad)
        is_fixed = is_fixed and self.num_prefix_tokens <= MAX_PREFIX
        packing = read_mask(embeds["attn_mask"], embeds["patches"]) if is_fixed else None
        if packing is not None:
            embeds |= {"patches": packing.pack(embeds["patches"]).unsqueeze(0), "attn_mask": packing}
        original = super(PackedTower, _pooling.view(self, _forward_embeds=lambda *args, **options: embeds))
        out = original.forward_features(*inputs)
        if packing is None:
            return out
        if isinstance(out, dict):
            return {**out, "patches": packing.unpack(out["patches"].squeeze(0))}
        return packing.unpack(out.squeeze(0))


# --- patch dropout --------------------------------------------------------------------------------------------------


class PatchDropout(AcceleratedModule):
    """Patch dropout with the same random numbers; one gather returns prefix and kept patches."""

    returns_indices = False

    def forward(self, x: Tensor) -> Any:
        drops_patches = self.training and self.prob > 0
        if not (drops_patches and dispatches_to("token_dropout", x, forced=self.is_forced)) or x.dim() != 3:
            return super().forward(x)
        prefix = self.num_prefix_tokens
        batch, patches = x.shape[0], x.shape[1] - prefix
        count = max(1, int(patches * (1.0 - self.prob)))
        keep = torch.argsort(torch.randn(batch, patches, device=x.device), dim=-1)[:, :count]
        if self.ordered:
            keep = keep.sort(dim=-1)[0]
        rows = keep
        if prefix:
            rows = torch.cat((torch.arange(prefix, device=x.device).expand(batch, -1), keep + prefix), 1)
        tokens = token_dropout(x, rows)
        return (tokens, keep) if self.returns_indices else tokens


class PatchDropoutWithIndices(PatchDropout):
    """`PatchDropout` that returns the indices, too."""

    returns_indices = True


# --- arguments for the comparison -------------------------------------------------------------------------------------


def masked_calls(module: Any, x: Tensor, **options: Any) -> list[Call]:
    """Calls with a mask and a causal one, for modules that take these."""
    mask = draw(x.shape[1], x.shape[1])
    return [((x,), {**options, **further}) for further in ({}, {"attn_mask": mask}, {"is_causal": True})]


def _rotary_calls(module: Any, x: Tensor) -> list[Call]:
    """Calls with a table that holds each angle twice, as timm's."""
    attention = getattr(module, "attn", module)
    width = int(attention.proj.in_features)
    patches, pairs = x.shape[1] - attention.num_prefix_tokens, width // attention.num_heads // 2
    angles, half = draw(patches, pairs), getattr(attention, "rotate_half", False)
    twice = torch.cat((angles, angles), -1) if half else angles.repeat_interleave(2, -1)
    return [*masked_calls(module, x, rope=torch.cat((twice.sin(), twice.cos()), -1)), ((x,), {})]


def _biased_calls(module: Any, x: Tensor) -> list[Call]:
    bias = module.attn.rel_pos
    if bias is not None:
        x = draw(2, bias.get_bias().shape[-1], x.shape[-1]).requires_grad_()
    return [((x,), {}), ((x,), {"shared_rel_pos": draw(1, 1, x.shape[1], x.shape[1])})]


def _tower_calls(module: Any, x: Tensor) -> list[Call]:
    flat, prefix = getattr(module.patch_embed, "flatten", True), module.num_prefix_tokens
    shape = (2, module.patch_embed.num_patches or 9) if flat else (2, 3, 3)  # of images of any size
    patches = draw(*shape, module.embed_dim).requires_grad_()
    count = prefix + patches[0, ..., 0].numel()
    options: tuple[dict[str, Any], ...] = ({}, {"attn_mask": draw(count, count)}, {"is_causal": True})
    return [((patches,), kwargs) for kwargs in options]


def _embed(patches: Tensor, patch_coord: Any, patch_valid: Any, attn_mask: Any) -> dict[str, Any]:
    """Replaces a tower's stem: a comparison starts with the tokens, rotary table and mask of the first block."""
    rope = patch_coord if patch_coord.dim() == 4 else None
    return {"patches": patches, "patch_valid": patch_valid, "rope_embeds": rope, "attn_mask": patch_valid}


def _packed_calls(module: Any, x: Tensor) -> list[Call]:
    places, attention = [x], module.blocks[0].attn
    if hasattr(attention, "rotate_half"):
        table = _rotary_calls(module.blocks[0], x)[0][1]["rope"]
        places.insert(0, torch.stack((table, table.flip(0))).unsqueeze(1))
    return [((x, place, mask, None), {}) for place in places for mask in padded_masks(x)[:2]]


_VIT, _EVA, _LAYERS = "timm.models.vision_transformer", "timm.models.eva", "timm.layers"
_ACTIVATIONS = f"{_LAYERS}.activations"
_RELATIVE = f"{_VIT}_relpos"
_DROP = f"{_LAYERS}.patch_dropout"


def _tower(name: str) -> Replacement:
    options: dict[str, Any] = {
        "stem": "patch_embed",
        "sizes": _shrink_sizes,
        "calls": _tower_calls,
        "constants": ("rope",),
    }
    return Replacement(Tower, name, "torch", "last block, class token", tower=_POOLING, **options)


REPLACEMENTS = (
    Replacement(LayerNorm, f"{_LAYERS}.norm.LayerNorm", "layer_norm", reason=require_1d, role="layer_norm"),
    Replacement(RMSNorm, f"{_LAYERS}.norm.RmsNorm", "rms_norm", "rms_norm", reason=require_1d, role="rms_norm"),
    Replacement(DropPath, f"{_LAYERS}.drop.DropPath", role="drop_path"),
    Replacement(LayerScale, f"{_LAYERS}.layer_scale.LayerScale", role="layer_scale"),
    Replacement(LayerScale, f"{_VIT}.LayerScale", role="layer_scale"),  # before 1.0.22
    Replacement(GELU, f"{_ACTIVATIONS}.GELUTanh", "gelu"),
    Replacement(QuickGELU, f"{_ACTIVATIONS}.QuickGELU", "quick_gelu"),
    Replacement(SwiGLU, f"{_LAYERS}.mlp.SwiGLU", "swiglu_norm", reason=require_silu),
    Replacement(GluMlp, f"{_LAYERS}.mlp.GluMlp", "swiglu", reason=_require_packed_silu),
    Replacement(Attention, f"{_LAYERS}.attention.Attention", "attention", calls=masked_calls),
    Replacement(Attention, f"{_VIT}.Attention", "attention", calls=masked_calls),  # before 1.0.16
    Replacement(RotaryAttention, f"{_LAYERS}.attention.AttentionRope", "rope_attention", calls=_rotary_calls),
    Replacement(RotaryAttention, f"{_EVA}.EvaAttention", "rope_attention", calls=_rotary_calls),
    Replacement(Block, f"{_VIT}.Block", block_gate, calls=masked_calls),
    Replacement(Block, f"{_RELATIVE}.RelPosBlock", block_gate, calls=_biased_calls),
    Replacement(Block, f"{_EVA}.EvaBlock", block_gate, calls=_rotary_calls),
    Replacement(PostNormBlock, f"{_VIT}.ResPostBlock", "norm_add", calls=masked_calls),
    Replacement(PostNormBlock, f"{_EVA}.EvaBlockPostNorm", "norm_add", calls=_rotary_calls),
    Replacement(PostNormBlock, f"{_RELATIVE}.ResPostRelPosBlock", "norm_add", calls=_biased_calls),
    _tower(f"{_VIT}.VisionTransformer"),
    _tower(f"{_EVA}.Eva"),
    Replacement(
        PackedTower,
        "timm.models.naflexvit.NaFlexVit",
        "packed_attention",
        calls=_packed_calls,
        settings=(("_forward_embeds", _embed), ("rope_is_mixed", False), ("pools", True)),
        tower=_BLOCKS,
        compared=without_padding,
    ),
    Replacement(PatchDropout, f"{_DROP}.PatchDropout", "token_dropout"),
    Replacement(PatchDropoutWithIndices, f"{_DROP}.PatchDropoutWithIndices", "token_dropout"),
)
