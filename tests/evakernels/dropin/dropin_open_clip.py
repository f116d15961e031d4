"""open_clip's models and losses, small, with random weights: nothing is loaded."""

from functools import partial
from typing import Any

import torch
from dropin_family import Family, randomised
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from timm.models.eva import Eva
from torch import Tensor, nn

_TEXT = {"context_length": 12, "vocab_size": 50, "width": 64, "heads": 2, "layers": 2}
_VISION = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32}
_CUSTOM = {"block_type": "custom", "qk_norm": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}


def _pair(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(4, 3, 32, 32, generator=generator)
    return {"image": image, "text": torch.randint(1, 49, (4, 12), generator=generator)}


def _embeddings(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    image, text, *_ = model(**inputs)
    return torch.cat((image, text))


def _family(
    kind: type[nn.Module], vision: dict[str, Any], text: dict[str, Any], *ops: str, quick_gelu: bool = False
) -> Family:
    def build() -> nn.Module:
        return kind(16, CLIPVisionCfg(**vision), CLIPTextCfg(**text), quick_gelu=quick_gelu)

    return Family(
        partial(randomised, build), {"layer_norm", "add_layer_norm", "rope_attention", "gelu", *ops}, _pair, _embeddings
    )


def _eva() -> nn.Module:
    """As EVA02-B-16: timm's tower, whose smallest is still too large, so another takes its place."""
    vision = {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": "linear"}
    model = CustomTextCLIP(16, CLIPVisionCfg(**vision), CLIPTextCfg(**_TEXT))
    model.visual.trunk = Eva(
        img_size=32,
        patch_size=8,
        embed_dim=model.visual.trunk.embed_dim,
        depth=2,
        num_heads=3,
        num_classes=0,
        global_pool="token",
        mlp_ratio=8 / 3,
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(16, 16),
    )
    return model


OPEN_CLIP = {
    "open-clip": _family(CLIP, {**_VISION, "ls_init_value": 0.5}, _TEXT, quick_gelu=True),
    "open-clip-dropout": _family(CLIP, {**_VISION, "patch_dropout": 0.4}, _TEXT, "token_dropout"),
    "open-clip-eva": Family(
        partial(randomised, _eva),
        {"layer_norm", "add_layer_norm", "rope_attention", "swiglu", "gelu"},
        _pair,
        _embeddings,
    ),
    "open-clip-custom": _family(CustomTextCLIP, {**_VISION, **_CUSTOM}, {**_TEXT, "ls_init_value": 0.5}),
}
