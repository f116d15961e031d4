"""Families of transformers, small, with random weights: nothing is loaded."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from dropin_family import Family, randomised
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    LlamaConfig,
    LlamaModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {**_SIZES, "image_size": 32, "patch_size": 8}
_NAFLEX = {**_SIZES, "patch_size": 8, "num_patches": 16}
_TEXT = {**_SIZES, "vocab_size": 50, "max_position_embeddings": 12, "projection_size": 64}


def _pixels(seed: int) -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def _tokens(seed: int) -> Tensor:
    return torch.randint(3, 49, (4, 12), generator=torch.Generator().manual_seed(seed))


def _pair(seed: int) -> dict[str, Any]:
    return {"pixel_values": _pixels(seed), "input_ids": _tokens(seed)}


def _patches(seed: int) -> dict[str, Any]:
    pixels = torch.randn(4, 16, 3 * 8 * 8, generator=torch.Generator().manual_seed(seed))
    shapes, mask = torch.tensor([[4, 4]] * 4), torch.ones(4, 16, dtype=torch.int32)
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes, "input_ids": _tokens(seed)}


def _embeddings(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    out = model(**inputs)
    return torch.cat((out.image_embeds, out.text_embeds))


def _last(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    hidden: Tensor = model(**inputs).last_hidden_state
    return hidden


def _family(build: Callable[[], nn.Module], ops: set[str], inputs: Any, features: Any = _last) -> Family:
    return Family(partial(randomised, build), ops, inputs, features)


_NORMS = {"layer_norm", "add_layer_norm"}

TRANSFORMERS = {
    "clip": _family(
        lambda: CLIPModel(CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=16)),
        {*_NORMS, "rope_attention", "gelu"},
        _pair,
        _embeddings,
    ),
    "siglip": _family(
        lambda: SiglipModel(SiglipConfig(text_config=_TEXT, vision_config=_VISION)),
        {*_NORMS, "rope_attention", "gelu"},
        _pair,
        _embeddings,
    ),
    "siglip2": _family(
        lambda: Siglip2Model(Siglip2Config(text_config=_TEXT, vision_config=_NAFLEX)),
        {*_NORMS, "rope_attention", "gelu"},
        _patches,
        _embeddings,
    ),
    "dinov3-vit": _family(
        lambda: DINOv3ViTModel(DINOv3ViTConfig(**_VISION, num_register_tokens=2, drop_path_rate=0.2)),
        {*_NORMS, "rope_attention", "gelu"},
        lambda seed: {"pixel_values": _pixels(seed)},
    ),
    "dinov3-vit-gated": _family(
        lambda: DINOv3ViTModel(DINOv3ViTConfig(**_VISION, use_gated_mlp=True, hidden_act="silu")),
        {*_NORMS, "rope_attention", "swiglu"},
        lambda seed: {"pixel_values": _pixels(seed)},
    ),
    "llama": _family(
        lambda: LlamaModel(LlamaConfig(**_SIZES, vocab_size=50)),
        {"layer_norm", "swiglu", "rope_attention"},
        lambda seed: {"input_ids": _tokens(seed)},
    ),
    "llama-grouped": _family(
        lambda: LlamaModel(LlamaConfig(**{**_SIZES, "num_attention_heads": 4}, num_key_value_heads=2, vocab_size=50)),
        {"layer_norm", "swiglu", "rope_attention"},
        lambda seed: {"input_ids": _tokens(seed)},
    ),
}
