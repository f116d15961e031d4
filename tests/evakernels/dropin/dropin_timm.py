"""timm's families, small, with random weights: nothing is loaded."""

from functools import partial
from typing import Any

import torch
from dropin_family import Family, randomised
from timm.layers import RmsNorm, SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import nn

ATTENTION, SWIGLU, ADD_NORM, NORM = "rope_attention", "swiglu", "add_layer_norm", "layer_norm"
BLOCK = {ATTENTION, ADD_NORM, NORM}


def images(seed: int) -> dict[str, Any]:
    return {"x": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))}


def _timm(kind: type[nn.Module], *ops: str, **options: Any) -> Family:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
    return Family(
        partial(randomised, partial(kind, **sizes, **options)),
        BLOCK | set(ops) | (set() if SWIGLU in ops else {"gelu"}),
        images,
        lambda model, inputs: model.forward_features(**inputs),
    )


_ROPE = {"use_rot_pos_emb": True}
_EVA02 = {**_ROPE, "mlp_ratio": 8 / 3, "swiglu_mlp": True, "ref_feat_shape": (16, 16)}

TIMM = {
    "eva": _timm(Eva, "token_dropout", patch_drop_rate=0.25, drop_path_rate=0.2),
    "eva02": _timm(
        Eva, SWIGLU, "token_dropout", **_EVA02, qkv_fused=False, scale_mlp=True, patch_drop_rate=0.5, drop_path_rate=0.2
    ),
    "eva02-packed": _timm(Eva, SWIGLU, **_EVA02, scale_attn_inner=True, init_values=0.5),
    "eva-post-norm": _timm(Eva, "layer_norm_add", **_ROPE, use_post_norm=True, drop_path_rate=0.2),
    "dinov3": _timm(
        Eva,
        **_ROPE,
        rope_type="dinov3",
        rope_rotate_half=True,
        init_values=0.5,
        qkv_bias=False,
        num_reg_tokens=4,
        use_abs_pos_emb=False,
    ),
    "dinov3-gated": _timm(
        Eva,
        SWIGLU,
        **_ROPE,
        rope_type="dinov3",
        rope_rotate_half=True,
        swiglu_mlp=True,
        swiglu_align_to=8,
        init_values=0.5,
    ),
    "perception-encoder": _timm(
        Eva,
        **_ROPE,
        attn_type="rope",
        rope_grid_indexing="xy",
        rope_grid_offset=1.0,
        use_pre_transformer_norm=True,
        global_pool="map",
        init_values=0.5,
    ),
    "rope-grouped": _timm(
        Eva,
        **_ROPE,
        attn_type="rope",
        rope_type="dinov3",
        rope_rotate_half=True,
        qkv_fused=False,
        num_kv_heads=1,
        qk_norm=True,
    ),
    "rope-mixed": _timm(Eva, **_ROPE, attn_type="rope", rope_type="mixed", qk_norm=True),
    "vit": _timm(
        VisionTransformer, "token_dropout", init_values=0.5, drop_path_rate=0.3, patch_drop_rate=0.4, reg_tokens=2
    ),
    "vit-swiglu": _timm(
        VisionTransformer, SWIGLU, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, qk_norm=True, scale_attn_norm=True
    ),
    "vit-rms": _timm(VisionTransformer, norm_layer=RmsNorm, class_token=False, global_pool="avg"),
    "vit-post-norm": _timm(
        VisionTransformer, "layer_norm_add", block_fn=ResPostBlock, init_values=0.5, act_layer="quick_gelu"
    ),
    "relative": _timm(VisionTransformerRelPos, init_values=0.5, drop_path_rate=0.2, class_token=True),
    "relative-post-norm": _timm(VisionTransformerRelPos, "layer_norm_add", block_fn=ResPostRelPosBlock),
}
TIMM["eva-post-norm"].ops.difference_update({ADD_NORM, NORM})
TIMM["vit-post-norm"].ops.discard(ADD_NORM)
TIMM["relative"].ops.discard(ATTENTION)
TIMM["relative-post-norm"].ops.difference_update({ATTENTION, ADD_NORM})
