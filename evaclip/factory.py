"""Models, transforms and tokenizers by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from evaclip.errors import UserError, unknown_name
from evaclip.model.clip import CLIP
from evaclip.model.config import ALIASES, get_config, list_models, override
from evaclip.model.savings import Savings
from evaclip.model.vision_model import VisionModel
from evaclip.model.vision_names import RELEASES, split_name, vision_config
from evaclip.tokenizer import Tokenizer
from evaclip.transforms import EvalTransform, TrainTransform
from evaclip.weights import find_weights, materialize, read_preprocess, start_image_tower, start_text_tower

__all__ = [
    "create_model",
    "create_model_and_transforms",
    "create_vision_model",
    "get_config",
    "get_tokenizer",
    "list_models",
]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def create_model(
    name: str,
    *,
    pretrained: str | Path | None = None,
    pretrained_image: str | Path | None = None,
    pretrained_text: str | Path | None = None,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    savings: Savings | None = None,
    prepare: Callable[[CLIP], None] | None = None,
    **overrides: Any,
) -> CLIP:
    """A model in training mode, with random or pretrained weights.

    Args:
        name: one of `list_models()`, or open_clip's name of the same model.
        pretrained: a weights file, a checkpoint or run folder, `hf-hub:OWNER/NAME[/FILE]`, or the tag of released
            weights; None for random ones.
        pretrained_image: weights that the image tower starts from, of masked image modelling or of a CLIP model, as a
            file or `hf-hub:...`; heads and temperature keep their start values.
        pretrained_text: weights that the text tower starts from, of a CLIP model of any library.
        device: where the parameters lie; `meta` builds the model without memory or values.
        precision: fp32, bf16 or fp16, the dtype of the parameters.
        savings: what the model leaves out without changing a result; by default all that costs nothing.
        prepare: called with the model before it has memory or values, such as to shard it.
        overrides: options of the configuration to change, such as `vision={"patch_dropout": 0.5}`.

    Raises:
        UserError: for names, options or weights that don't exist or don't fit together.
    """
    dtype, target = _dtype(precision), _device(device)
    config = override(get_config(name), overrides)
    if pretrained and (pretrained_image or pretrained_text):
        raise UserError("give either pretrained, for the whole model, or pretrained_image and pretrained_text")
    weights = find_weights(pretrained, ALIASES.get(name, name)) if pretrained else None
    if weights is not None:
        config = replace(config, preprocess=read_preprocess(weights) or config.preprocess)
    # On the meta device first: no value is computed that is overwritten afterwards.
    with torch.device("meta"):
        model = CLIP(config, savings)
    if prepare is not None:
        prepare(model)
    if target.type == "meta":
        return model.to(dtype)
    if weights is None:
        model.to_empty(device=target).reset_parameters()
        if pretrained_image:
            start_image_tower(model.visual, find_weights(pretrained_image, name))
        if pretrained_text:
            start_text_tower(model.text, find_weights(pretrained_text, name))
        return model.to(dtype)
    materialize(model.to(dtype), weights, target)
    return model


def create_vision_model(
    name: str,
    *,
    pretrained: bool | str | Path = False,
    num_classes: int | None = None,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    savings: Savings | None = None,
    **overrides: Any,
) -> VisionModel:
    """An image model of the EVA series in training mode, with random or pretrained weights.

    Args:
        name: timm's name, such as `eva02_base_patch14_448.mim_in22k_ft_in1k`; without a tag the model's first.
        pretrained: True for the weights that the tag stands for; or a file, or `hf-hub:OWNER/NAME`, in timm's layout
            or the authors'.
        num_classes: of the classifier; None for that of the weights, 0 for none. A classifier of another size than
            that of the weights gets start values.
        device, precision, savings: as for `create_model`.
        overrides: options of `VisionConfig` to change, such as `image_size=(448, 672)`.

    Raises:
        UserError: for names, options or weights that don't exist or don't fit together.
    """
    dtype, target = _dtype(precision), _device(device)
    model_name, tag = split_name(name)
    tag = tag or next(iter(RELEASES[model_name]))
    release = RELEASES[model_name][tag]
    config = override(vision_config(model_name), overrides)
    classes = release.num_classes if num_classes is None else num_classes
    with torch.device("meta"):
        model = VisionModel(config, release.num_classes if pretrained else classes, release.preprocess, savings)
    if target.type == "meta":
        return model.to(dtype)
    if not pretrained:
        model.to_empty(device=target).reset_parameters()
        return model.to(dtype)
    source = f"hf-hub:timm/{model_name}.{tag}" if pretrained is True else pretrained
    materialize(model.to(dtype), find_weights(source, name), target)
    if classes != release.num_classes:
        model.reset_classifier(classes)
    return model


def create_model_and_transforms(
    name: str,
    pretrained: str | Path | None = None,
    **options: Any,
) -> tuple[CLIP, TrainTransform, EvalTransform]:
    """`create_model`, and the transforms for training and for evaluation that belong to its weights."""
    model = create_model(name, pretrained=pretrained, **options)
    size, preprocess = model.config.vision.image_size, model.config.preprocess
    return model, TrainTransform(size, preprocess), EvalTransform(size, preprocess)


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model, with its context length and vocabulary."""
    text = get_config(name).text
    return Tokenizer(text.context_length, text.vocab_size)


def _dtype(precision: str) -> torch.dtype:
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    return PRECISIONS[precision]


def _device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as exc:
        accepted = "cpu, meta" + (", cuda, cuda:N" if torch.cuda.is_available() else "; there is no CUDA device here")
        raise UserError(f"device {str(device)!r} can't be used; accepted: {accepted}") from exc
    return target
