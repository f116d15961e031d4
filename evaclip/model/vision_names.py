"""Image models of the EVA series and NaFlexVits under timm's names, and their released weights."""

import re
from dataclasses import dataclass

from evaclip.errors import UserError, unknown_name
from evaclip.model.config import Preprocess, VisionConfig

_PLAIN = {"mlp": "gelu", "sub_norm": False, "rope": False}
_SIZES: dict[str, dict[str, object]] = {
    "eva_large": {"width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4.0, **_PLAIN},
    "eva_giant": {"width": 1408, "layers": 40, "heads": 16, "mlp_ratio": 4.3637, **_PLAIN},
    "eva02_tiny": {"width": 192, "heads": 3, "sub_norm": False},
    "eva02_small": {"width": 384, "heads": 6, "sub_norm": False},
    "eva02_base": {},
    "eva02_large": {"width": 1024, "layers": 24, "heads": 16},
    "eva02_enormous": {
        "width": 1792,
        "layers": 64,
        "heads": 16,
        "mlp_ratio": 15360 / 1792,
        "post_norm": True,
        **_PLAIN,
    },
}
_NAFLEX = {**_PLAIN, "image_size": 256, "mlp_ratio": 4.0, "pos_antialias": True}
_SCALED = {**_NAFLEX, "layer_scale_init": 1e-5}
_SO150M = {**_SCALED, "width": 832, "layers": 21, "heads": 13, "mlp_ratio": 34 / 13}
_SIGLIP = {**_NAFLEX, "mlp": "gelu_tanh", "pool": "attention", "prefix_tokens": 0, "pos_interpolation": "bilinear"}
_NAFLEX_MODELS: dict[str, dict[str, object]] = {
    "naflexvit_base_patch16_gap": {**_SCALED, "pool": "mean", "prefix_tokens": 4},
    "naflexvit_base_patch16_par_gap": {**_SCALED, "pool": "mean", "prefix_tokens": 4, "pos_square": True},
    "naflexvit_base_patch16_map": {**_SCALED, "pool": "attention"},
    "naflexvit_so150m2_patch16_reg1_gap": {**_SO150M, "pool": "mean"},
    "naflexvit_so150m2_patch16_reg1_map": {**_SO150M, "pool": "attention"},
    "naflexvit_base_patch16_siglip": _SIGLIP,
    "naflexvit_so400m_patch16_siglip": {**_SIGLIP, "width": 1152, "layers": 27, "heads": 16, "mlp_ratio": 3.7362},
}
_NAME = re.compile(r"(?P<size>eva\w*?_[a-z]+)_patch(?P<patch>\d+)(?P<clip>_clip)?_(?P<image>\d+)")

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_CENTRE = Preprocess(crop=0.9)
_WHOLE = Preprocess()
_SQUASH = Preprocess(resize="squash")
UNTRAINED = "untrained"
"""timm's tag of models without released weights."""
_HALF = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
_SQUASH_IMAGENET = Preprocess(resize="squash", **_IMAGENET)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Release:
    """Released weights on the hub, `timm/NAME.TAG`.

    Attributes:
        num_classes: of the classifier; 0 without one.
        preprocess: of images.
        eval_size: side of images in evaluation; None for the model's.
    """

    num_classes: int
    preprocess: Preprocess
    eval_size: int | None = None


RELEASES: dict[str, dict[str, Release]] = {
    "eva_giant_patch14_224": {"clip_ft_in1k": Release(1000, _CENTRE)},
    "eva_giant_patch14_336": {
        "clip_ft_in1k": Release(1000, _SQUASH),
        "m30m_ft_in22k_in1k": Release(1000, _SQUASH_IMAGENET),
    },
    "eva_giant_patch14_560": {"m30m_ft_in22k_in1k": Release(1000, _SQUASH_IMAGENET)},
    "eva_giant_patch14_clip_224": {
        "laion400m": Release(1024, _CENTRE),
        "merged2b": Release(1024, _CENTRE),
    },
    "eva_large_patch14_196": {
        "in22k_ft_in1k": Release(1000, _WHOLE),
        "in22k_ft_in22k_in1k": Release(1000, _WHOLE),
    },
    "eva_large_patch14_336": {
        "in22k_ft_in1k": Release(1000, _SQUASH),
        "in22k_ft_in22k_in1k": Release(1000, _SQUASH),
    },
    "eva02_tiny_patch14_224": {"mim_in22k": Release(0, _CENTRE)},
    "eva02_tiny_patch14_336": {"mim_in22k_ft_in1k": Release(1000, _WHOLE)},
    "eva02_small_patch14_224": {"mim_in22k": Release(0, _CENTRE)},
    "eva02_small_patch14_336": {"mim_in22k_ft_in1k": Release(1000, _WHOLE)},
    "eva02_base_patch14_224": {"mim_in22k": Release(0, _CENTRE)},
    "eva02_base_patch14_448": {
        "mim_in22k_ft_in1k": Release(1000, _WHOLE),
        "mim_in22k_ft_in22k": Release(21841, _SQUASH),
        "mim_in22k_ft_in22k_in1k": Release(1000, _SQUASH),
    },
    "eva02_base_patch16_clip_224": {"merged2b": Release(512, _CENTRE)},
    "eva02_large_patch14_224": {
        "mim_in22k": Release(0, _CENTRE),
        "mim_m38m": Release(0, _CENTRE),
    },
    "eva02_large_patch14_448": {
        "mim_in22k_ft_in1k": Release(1000, _WHOLE),
        "mim_in22k_ft_in22k": Release(21841, _SQUASH),
        "mim_in22k_ft_in22k_in1k": Release(1000, _SQUASH),
        "mim_m38m_ft_in1k": Release(1000, _WHOLE),
        "mim_m38m_ft_in22k": Release(21841, _SQUASH),
        "mim_m38m_ft_in22k_in1k": Release(1000, _SQUASH),
    },
    "eva02_large_patch14_clip_224": {"merged2b": Release(768, _CENTRE)},
    "eva02_large_patch14_clip_336": {"merged2b": Release(768, _WHOLE)},
    "eva02_enormous_patch14_clip_224": {
        "laion2b": Release(1024, _CENTRE),
        "laion2b_plus": Release(1024, _CENTRE),
    },
    "naflexvit_base_patch16_gap": {"e300_s576_in1k": Release(1000, _HALF, 384)},
    "naflexvit_base_patch16_par_gap": {"e300_s576_in1k": Release(1000, _HALF, 384)},
    "naflexvit_base_patch16_map": {UNTRAINED: Release(1000, _HALF, 384)},
    "naflexvit_so150m2_patch16_reg1_gap": {UNTRAINED: Release(1000, _HALF, 384)},
    "naflexvit_so150m2_patch16_reg1_map": {UNTRAINED: Release(1000, _HALF, 384)},
    "naflexvit_base_patch16_siglip": {"v2_webli": Release(0, _HALF, 384)},
    "naflexvit_so400m_patch16_siglip": {"v2_webli": Release(0, _HALF, 384)},
}
"""Model -> tag -> release."""


def _plain(name: str) -> str:
    return name.lower().removeprefix("hf-hub:").removeprefix("timm/").partition(".")[0]


def split_name(name: str) -> tuple[str, str | None]:
    """Model and tag of `NAME` or `NAME.TAG`, in any case, also with `timm/` or `hf-hub:timm/` in front.

    Raises:
        UserError: for a model or a tag that doesn't exist.
    """
    model, tag = _plain(name), name.lower().partition(".")[2]
    if model not in RELEASES:
        raise unknown_name("vision model", model, RELEASES)
    if tag and tag not in RELEASES[model]:
        raise unknown_name(f"tag of {model}", tag, RELEASES[model])
    return model, tag or None


def is_vision_model(name: str) -> bool:
    """Whether `split_name` knows the model of this name."""
    return _plain(name) in RELEASES


def vision_config(model: str) -> VisionConfig:
    """Configuration of a model of timm.

    Raises:
        UserError: for a name of another form.
    """
    if model in _NAFLEX_MODELS:
        return VisionConfig(**_NAFLEX_MODELS[model])  # type: ignore[arg-type]
    match = _NAME.fullmatch(model)
    if match is None or match["size"] not in _SIZES:
        raise UserError(f"unknown vision model {model!r}")
    is_clip = match["clip"] is not None
    return VisionConfig(
        image_size=int(match["image"]),
        patch_size=int(match["patch"]),
        pool="token" if is_clip else "mean",
        attn_sub_norm=is_clip,
        **_SIZES[match["size"]],  # type: ignore[arg-type]
    )
