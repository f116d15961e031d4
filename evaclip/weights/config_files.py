"""Configuration files next to weights: open_clip_config.json and preprocess.json."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from evaclip.atomic import reading
from evaclip.errors import UserError
from evaclip.model.config import CLIPConfig, Preprocess, TextConfig, VisionConfig, override
from evaclip.model.vision_names import RELEASES, split_name, vision_config
from evaclip.runs.files import PREPROCESS_FILE

OPEN_CLIP_CONFIG_FILE = "open_clip_config.json"

_TEXT = ("context_length", "vocab_size", "width", "heads", "layers")
_PLAIN_TEXT = ("norm_eps", "mlp", "causal", "proj_bias")
_HF_TEXT = ("context_length", "hf_model_name", "hf_tokenizer_name", "hf_pooler_type", "hf_proj_type")
_PREPROCESS = {"mean": "mean", "std": "std", "interpolation": "interpolation", "resize": "resize_mode"}
_TOWER = {"timm_model_pretrained": False, "timm_pool": "token", "timm_proj": None}
_SIZE = "image_size"


def to_open_clip_config(config: CLIPConfig) -> dict[str, Any]:
    """Contents of open_clip_config.json, without options of training alone such as `drop_path`.

    Raises:
        UserError: open_clip has no model of this configuration.
    """
    vision, text = config.vision, config.text
    preprocess = {theirs: getattr(config.preprocess, ours) for ours, theirs in _PREPROCESS.items()}
    model: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "vision_cfg": {"image_size": vision.image_size, "timm_model_name": _tower(vision), **_TOWER},
        "text_cfg": {name: getattr(text, name) for name in (_HF_TEXT if text.hf_model_name else _TEXT)},
        "custom_text": True,
    }
    if config.init_logit_bias is not None:
        model["init_logit_bias"] = config.init_logit_bias
    if tokenizer := text.hf_tokenizer_name or text.hf_model_name:
        model["text_cfg"]["hf_tokenizer_name"] = tokenizer
    if text.hf_model_name:
        if text.hf_pooler_type == "last_pooler":
            raise UserError("open_clip can't load this model: it has no text.hf_pooler_type last_pooler")
    elif text.mlp_ratio != TextConfig.mlp_ratio:
        model["text_cfg"]["mlp_ratio"] = text.mlp_ratio
    for name, value, only in (
        *((f"text.{name}", getattr(text, name), getattr(TextConfig, name)) for name in _PLAIN_TEXT),
        ("preprocess.crop", config.preprocess.crop, Preprocess.crop),
    ):
        if value != only:
            raise UserError(f"{name} must be {only} for open_clip's layout, got {value}")
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def read_open_clip_config(path: Path) -> CLIPConfig:
    """Configuration in an open_clip_config.json.

    Raises:
        UserError: there is no such file, or it describes a model that doesn't exist here.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _parsed(content["model_cfg"], content.get("preprocess_cfg", {}))
    except FileNotFoundError:
        raise UserError(f"there is no file {str(path)!r}, which names the model of the weights next to it") from None
    except (OSError, ValueError, TypeError, AttributeError) as exc:
        raise UserError(f"{str(path)!r} can't be read: {exc}") from exc
    except KeyError as exc:
        raise UserError(f"{str(path)!r} lacks {exc}, which open_clip's models of the EVA series have") from exc
    except UserError as exc:
        raise UserError(f"{str(path)!r}: {exc}") from exc


def _tower(vision: VisionConfig) -> str:
    """timm's name of the image tower."""
    plain = replace(vision, drop_path=0.0, patch_dropout=0.0)
    towers = {name: vision_config(name) for name in RELEASES if "_clip_" in name}
    for name, released in towers.items():
        if released == plain:
            return name
    fields = asdict(plain).items()
    gaps = {name: [f"{k}={v}" for k, v in fields if v != getattr(released, k)] for name, released in towers.items()}
    nearest = min(gaps, key=lambda name: len(gaps[name]))
    raise UserError(
        f"open_clip can't load this model: it has no such image tower; {nearest} differs in {', '.join(gaps[nearest])}."
        " `evaclip convert` writes weights alone"
    )


def _parsed(model: Mapping[str, Any], preprocess: Mapping[str, Any]) -> CLIPConfig:
    tower, text = dict(model["vision_cfg"]), dict(model["text_cfg"])
    for training_option in ("patch_dropout", "timm_drop_path"):
        tower.pop(training_option, None)
    architecture, size = split_name(tower.pop("timm_model_name"))[0], tower.pop("image_size")
    vision = replace(vision_config(architecture), pool="token")
    unknown = {name: value for name, value in tower.items() if value not in (_TOWER.get(name), None, False)}
    unknown |= {
        name: text.pop(name)
        for name in list(text)
        if name not in (*_TEXT, *_HF_TEXT, "mlp_ratio", "hf_model_pretrained")
    }
    if model.get("quick_gelu"):  # another activation of the text tower, without any weights
        unknown["quick_gelu"] = True
    if size not in (vision.image_size, [vision.image_size] * 2):
        unknown["image_size"] = size
    if unknown:
        raise UserError(f"a model with {', '.join(f'{k}={v!r}' for k, v in unknown.items())} doesn't exist here")
    images = {ours: preprocess[theirs] for ours, theirs in _PREPROCESS.items() if theirs in preprocess}
    common = {name: model[name] for name in ("embed_dim", "init_logit_scale", "init_logit_bias") if name in model}
    return override(CLIPConfig(vision=vision), {**common, "text": text, "preprocess": images})


def describe_preprocess(config: CLIPConfig) -> dict[str, Any]:
    """Contents of preprocess.json: image size, mean, standard deviation, interpolation, resize mode."""
    return {_SIZE: config.vision.image_size, **config.to_dict()["preprocess"]}


def read_preprocess(weights: Path) -> Preprocess | None:
    """Preprocessing in the preprocess.json next to a weights file; None without one.

    Raises:
        UserError: for a file that can't be understood.
    """
    path = weights.parent / PREPROCESS_FILE
    if not path.is_file():
        return None
    with reading(path):
        options = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(options, dict):
        raise UserError(f"{path} holds a {type(options).__name__}; expected an object with the preprocessing")
    # The size follows from the model; it is there for other readers of the file.
    options.pop(_SIZE, None)
    try:
        return override(Preprocess(), options)
    except UserError as exc:
        raise UserError(f"{path}: {exc}") from exc
