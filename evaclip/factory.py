"""Models, transforms and tokenizers by name, and the lists of names, with the function names of open_clip and timm."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from evaclip.augmentation import Augmentation
from evaclip.errors import UserError, unknown_name
from evaclip.model.clip import CLIP
from evaclip.model.config import CLIPConfig, Savings, TextConfig, find_model, get_config, override
from evaclip.model.hf_text import HFTokenizer
from evaclip.model.masked_image import MaskedImageModel
from evaclip.model.vision_model import VisionModel
from evaclip.model.vision_names import RELEASES, UNTRAINED, split_name, vision_config
from evaclip.tokenizer import Tokenizer
from evaclip.transforms import EvalTransform, NativeSize, PackedTransform, TrainTransform, image_transform
from evaclip.weights import find_weights, materialize, read_preprocess, start_image_tower, start_text_tower
from evaclip.weights.config_files import OPEN_CLIP_CONFIG_FILE, read_open_clip_config
from evaclip.weights.files import classifier_size, read_checkpoint, read_model_options, read_tensors
from evaclip.weights.hub import HUB, LOCAL, RELEASED, download_file

M = TypeVar("M", CLIP, VisionModel, MaskedImageModel)

PRECISIONS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    # open_clip's names; the autocast of amp is the caller's, there as here.
    "pure_bf16": torch.bfloat16,
    "pure_fp16": torch.float16,
    "amp": torch.float32,
    "amp_bf16": torch.float32,
    "amp_bfloat16": torch.float32,
}
# open_clip's keyword arguments: the part of the configuration and the option that each one sets.
_SPELLINGS = {
    "force_image_size": ("vision", "image_size"),
    "force_patch_dropout": ("vision", "patch_dropout"),
    "force_context_length": ("text", "context_length"),
    "image_mean": ("preprocess", "mean"),
    "image_std": ("preprocess", "std"),
    "image_interpolation": ("preprocess", "interpolation"),
    "image_resize_mode": ("preprocess", "resize"),
}


def create_model(
    model_name: str,
    pretrained: str | Path | None = None,
    *,
    pretrained_image: str | Path | None = None,
    pretrained_text: str | Path | None = None,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    savings: Savings | None = None,
    prepare: Callable[[CLIP], None] | None = None,
    as_trained: bool = True,
    **overrides: Any,
) -> CLIP:
    """A model in training mode, with random or pretrained weights.

    Args:
        model_name: one of `list_models()`, or open_clip's name of the same model, in any spelling; or a source of the
            weights, too: a repository of the hub `hf-hub:OWNER/NAME`, such a folder `local-dir:FOLDER`, or a run or
            checkpoint folder, with averaged weights if the run has them.
        pretrained: a weights file, a checkpoint or run folder, `hf-hub:OWNER/NAME[/FILE]`, or the tag of released
            weights; None for random ones.
        pretrained_image: initial weights of the image tower, of masked image modelling or of a CLIP model, as a file or
            `hf-hub:...`; heads and temperature keep their initial values.
        pretrained_text: initial weights of the text tower, of a CLIP model of any library.
        device: device of the parameters; `meta` builds the model without memory or values.
        precision: fp32, bf16 or fp16, the dtype of the parameters; or open_clip's name of it.
        savings: memory and compute options; by default all that skip work without recomputation.
        prepare: called with the model before it has memory or values, for example to shard it.
        as_trained: take options such as the image size from the run or checkpoint `pretrained`, if it is of this model.
            False: take them from `model_name`; positions of another image size are resized, with a warning.
        overrides: options of the configuration to change, such as `vision={"patch_dropout": 0.5}`; or open_clip's
            names: force_image_size, force_patch_dropout, force_context_length, image_mean, image_std,
            image_interpolation, image_resize_mode.

    Raises:
        UserError: a name, option or weight doesn't exist, or they don't fit together.

    Example:
        `evaclip.create_model("EVA02-CLIP-B-16", "merged2b_s8b_b131k", device="cuda", precision="bf16").eval()`
    """
    dtype, target = _dtype(precision), _device(device)
    options = _options(overrides)
    described = _described(model_name)
    config = override(described, options)
    if _is_folder(model_name):
        model_name, latest = _run_of(model_name)
        pretrained = pretrained or latest
    if model_name.startswith((HUB, LOCAL)) and not (pretrained or pretrained_image or pretrained_text):
        pretrained = model_name
    if pretrained and (pretrained_image or pretrained_text):
        raise UserError("give either pretrained, for the whole model, or pretrained_image and pretrained_text")
    known_name = find_model(model_name) or model_name
    weights = find_weights(pretrained, known_name) if pretrained else None
    if weights is not None:
        if as_trained:
            config = override(override(described, _stored_options(weights, known_name)), options)
        config = _with_stored_preprocess(config, weights, options)
        if target.type != "meta" and config.init_logit_bias is None and "logit_bias" in read_tensors(weights):
            config = replace(config, init_logit_bias=0.0)  # which the weights replace

    def start(model: CLIP) -> None:
        if pretrained_image:
            start_image_tower(model.visual, find_weights(pretrained_image, known_name))
        if pretrained_text:
            start_text_tower(model.text, find_weights(pretrained_text, known_name))

    return _build(partial(CLIP, config, savings), prepare, dtype, target, start, weights, known_name)


def create_vision_model(
    model_name: str,
    pretrained: bool | str | Path = False,
    *,
    pretrained_image: str | Path | None = None,
    num_classes: int | None = None,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    savings: Savings | None = None,
    prepare: Callable[[VisionModel], None] | None = None,
    as_trained: bool = True,
    **overrides: Any,
) -> VisionModel:
    """An image model of the EVA series in training mode, with random or pretrained weights.

    Args:
        model_name: timm's name, such as `eva02_base_patch14_448.mim_in22k_ft_in1k`; without a tag the model's first.
        pretrained: True for the weights that the tag stands for; or a file, a checkpoint or run folder, or
            `hf-hub:OWNER/NAME`, in timm's layout or the authors'. A `preprocess.json` next to it is used.
        pretrained_image: weights that all but the classifier starts from, of masked image modelling, of a CLIP model
            or of another classifier.
        num_classes: of the classifier; None for the size in the weights, 0 for none. A classifier of another size than
            in the weights is initialised.
        device, precision, savings, prepare: as for `create_model`.
        as_trained: as for `create_model`.
        overrides: options of `VisionConfig` to change, such as `image_size=(448, 672)`. `pos_antialias=True` resizes
            the positions of weights of another image size as timm does, not as the authors do.

    Raises:
        UserError: for names, options or weights that don't exist or don't fit together.

    Example:
        `evaclip.create_vision_model("eva02_tiny_patch14_224.mim_in22k", pretrained=True, num_classes=10)`
    """
    dtype, target = _dtype(precision), _device(device)
    architecture, tag = split_name(model_name)
    tag = tag or next(iter(RELEASES[architecture]))
    release = RELEASES[architecture][tag]
    if pretrained is True and tag == UNTRAINED:
        raise UserError(f"pretrained must be a file or folder, as {architecture} has no released weights, got True")
    config = override(vision_config(architecture), overrides)
    if pretrained and pretrained_image:
        raise UserError("give either pretrained, for the whole model, or pretrained_image, for all but the classifier")
    stored, preprocess = release.num_classes, release.preprocess
    source = f"hf-hub:timm/{architecture}.{tag}" if pretrained is True else pretrained or pretrained_image
    weights = find_weights(source, model_name) if source and target.type != "meta" else None
    if weights is not None and pretrained:
        stored, preprocess = classifier_size(weights), read_preprocess(weights) or preprocess
        if as_trained:
            stored_options = _stored_options(weights, architecture)
            names = {field.name for field in fields(config)}
            known = {name: option for name, option in stored_options.items() if name in names}
            config = override(override(vision_config(architecture), known), overrides)
    classes = stored or release.num_classes if num_classes is None else num_classes
    whole = weights if pretrained and (num_classes is None or classes == stored) else None

    def start(model: VisionModel) -> None:
        if weights is not None:
            start_image_tower(model, weights)

    make = partial(VisionModel, config, classes, preprocess, savings)
    return _build(make, prepare, dtype, target, start, whole, architecture)


def create_masked_image_model(
    model_name: str,
    features: int,
    pretrained: str | Path | None = None,
    *,
    pretrained_image: str | Path | None = None,
    decoder_layers: int = 0,
    patch_gradient: float = 1.0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    savings: Savings | None = None,
    prepare: Callable[[MaskedImageModel], None] | None = None,
    **overrides: Any,
) -> MaskedImageModel:
    """An image model of the EVA series for masked image modelling, in training mode.

    Args:
        model_name: timm's name of the image model.
        features: width of the features that it predicts.
        pretrained: weights of masked image modelling: a file, a run or checkpoint folder, `hf-hub:OWNER/NAME`.
        pretrained_image: weights of an image tower to start from; what predicts keeps its start values.
        decoder_layers, patch_gradient: as for `MaskedImageModel`.
        device, precision, savings, prepare: as for `create_model`.
        overrides: options of `VisionConfig` to change.

    Raises:
        UserError: for names, options or weights that don't exist or don't fit together.

    Example:
        `evaclip.factory.create_masked_image_model("eva02_tiny_patch14_224", 1024)`
    """
    if pretrained and pretrained_image:
        raise UserError("give either pretrained, for the whole model, or pretrained_image")
    dtype, target = _dtype(precision), _device(device)
    architecture, tag = split_name(model_name)
    release = RELEASES[architecture][tag or next(iter(RELEASES[architecture]))]
    config = override(vision_config(architecture), {"pool": "token", **overrides})
    weights = find_weights(pretrained, model_name) if pretrained and target.type != "meta" else None

    def start(model: MaskedImageModel) -> None:
        if pretrained_image:
            start_image_tower(model, find_weights(pretrained_image, model_name))

    make = partial(MaskedImageModel, config, features, decoder_layers, patch_gradient, release.preprocess, savings)
    return _build(make, prepare, dtype, target, start, weights, architecture)


def create_model_and_transforms(
    model_name: str,
    pretrained: str | Path | None = None,
    *,
    pretrained_image: str | Path | None = None,
    pretrained_text: str | Path | None = None,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    savings: Savings | None = None,
    augmentation: Augmentation | None = None,
    **overrides: Any,
) -> tuple[CLIP, TrainTransform | PackedTransform, EvalTransform | PackedTransform]:
    """`create_model`, and the transforms for training and for evaluation that belong to its weights.

    They pack images if `preprocess.max_patches` is set, as after training at native resolution.

    Args:
        augmentation: of the transform for training; by default a random crop.
        model_name, pretrained, pretrained_image, pretrained_text, device, precision, savings, overrides: as for
            `create_model`.

    Example:
        `model, _, preprocess = evaclip.create_model_and_transforms("EVA02-B-16", pretrained="merged2b_s8b_b131k")`
    """
    model = create_model(
        model_name,
        pretrained,
        pretrained_image=pretrained_image,
        pretrained_text=pretrained_text,
        device=device,
        precision=precision,
        savings=savings,
        **overrides,
    )
    vision, preprocess = model.config.vision, model.config.preprocess
    options = preprocess, augmentation or Augmentation()
    evaluation = image_transform(vision, preprocess)
    if preprocess.max_patches is None:
        return model, TrainTransform(vision.image_size, *options), evaluation
    training = TrainTransform(NativeSize(vision.patch_size, preprocess.max_patches), *options)
    return model, PackedTransform(training, vision.patch_size, vision.patch_dropout), evaluation


def create_model_from_pretrained(
    model_name: str,
    pretrained: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    savings: Savings | None = None,
    return_transform: bool = True,
    **overrides: Any,
) -> CLIP | tuple[CLIP, EvalTransform | PackedTransform]:
    """A model in evaluation mode that has pretrained weights for sure, and the transform of its images.

    Args:
        return_transform: whether to return the transform too.
        model_name, pretrained, device, precision, savings, overrides: as for `create_model`.

    Raises:
        UserError: without `pretrained`, naming the tags that the model has; else as `create_model`.

    Example:
        `model, preprocess = evaclip.create_model_from_pretrained("EVA02-B-16", "merged2b_s8b_b131k")`
    """
    if not (pretrained or model_name.startswith((HUB, LOCAL)) or _is_folder(model_name)):
        get_config(model_name)
        tags = ", ".join(list_pretrained_tags_by_model(model_name)) or "none"
        raise UserError(f"{model_name} needs pretrained: a file, a folder, hf-hub:OWNER/NAME, or a tag; it has: {tags}")
    model = create_model(
        model_name, pretrained, device=device, precision=precision, savings=savings, **overrides
    ).eval()
    transform = image_transform(model.config.vision, model.config.preprocess)
    return (model, transform) if return_transform else model


def get_tokenizer(model_name: str = "", context_length: int | None = None) -> Tokenizer | HFTokenizer:
    """The tokenizer of a model, with its context length and vocabulary; by default the released models' tokenizer.

    Raises:
        UserError: for an unknown model, or a tokenizer of transformers that can't be loaded.

    Example:
        `evaclip.get_tokenizer("EVA02-B-16")(["a cat", "a dog"])` is int64 `[2, 77]`.
    """
    text = _described(model_name).text if model_name else TextConfig()
    return tokenizer_of(text if context_length is None else replace(text, context_length=context_length))


def tokenizer_of(config: TextConfig) -> Tokenizer | HFTokenizer:
    """The tokenizer of a text tower; raises UserError as `get_tokenizer`."""
    name = config.hf_tokenizer_name or config.hf_model_name
    if name is None:
        return Tokenizer(config.context_length, config.vocab_size)
    return HFTokenizer(config.hf_folder or name, config.context_length)


def list_pretrained(as_str: bool = False) -> list[tuple[str, str]] | list[str]:
    """Model and tag of all released weights, or `MODEL:TAG` if `as_str`.

    Example:
        `("EVA02-CLIP-B-16", "merged2b_s8b_b131k") in evaclip.list_pretrained()`
    """
    pairs = [(model, tag) for model, tags in RELEASED.items() for tag in tags]
    return [":".join(pair) for pair in pairs] if as_str else pairs


def list_pretrained_tags_by_model(model: str) -> list[str]:
    """The tags of a model's released weights; none for a model without any.

    Example:
        `evaclip.list_pretrained_tags_by_model("EVA02-B-16")` is `["eva_clip", "merged2b_s8b_b131k"]`.
    """
    return list(RELEASED.get(find_model(model) or "", {}))


def list_vision_models(filter: str = "", pretrained: bool = False) -> list[str]:
    """Names for `create_vision_model`.

    Args:
        filter: a pattern with `*` and `?`; empty for all.
        pretrained: list `NAME.TAG` for each of the released weights.

    Example:
        `evaclip.list_vision_models("eva02_base*", pretrained=True)`
    """
    names = [f"{name}.{tag}" for name, tags in RELEASES.items() for tag in tags if tag != UNTRAINED]
    names = names if pretrained else list(RELEASES)
    return sorted(name for name in names if fnmatch(name, filter or "*"))


def get_model_config(model_name: str) -> dict[str, Any]:
    """All options of a model as plain data.

    Raises:
        UserError: for an unknown name, with the nearest known ones.

    Example:
        `evaclip.get_model_config("EVA02-B-16")["vision"]["patch_size"]` is 16.
    """
    return get_config(model_name).to_dict()


def _build(
    make: Callable[[], M],
    prepare: Callable[[M], None] | None,
    dtype: torch.dtype,
    target: torch.device,
    start: Callable[[M], None],
    weights: Path | None,
    name: str,
) -> M:
    """A model with weights, or without `weights` with start values, some of which `start` replaces.

    Raises:
        UserError: for weights that don't fit, in one line if a run of another model than `name` wrote them.
    """
    # On the meta device first: no value is computed that is overwritten afterwards.
    with torch.device("meta"), _WithoutValues():
        model = make()
    if prepare is not None:
        prepare(model)
    if target.type == "meta":
        return model.to(dtype)
    if weights is None:
        model.to_empty(device=target).reset_parameters()
        start(model)
        return model.to(dtype)
    try:
        materialize(model.to(dtype), weights, target)
    except UserError as exc:
        other = str(read_model_options(weights).get("name", ""))
        if not other or _stored_options(weights, name):
            raise
        raise UserError(f"pretrained must be weights of model {name!r}, got those of {other!r} ({weights})") from exc
    return model


class _WithoutValues(TorchFunctionMode):
    """Inside, no normal distribution is drawn from: on the meta device that has torch import its compiler, for seconds.

    Parameters have no values there, and get them when they have memory.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.erfinv_, Tensor.clamp_):  # of the truncated one, in torch 2.11
            return args[0]
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


def _described(model_name: str) -> CLIPConfig:
    """The configuration of a name, or the one next to the weights of a repository, a folder or a run."""
    if _is_folder(model_name):
        name, weights = _run_of(model_name)
        return override(get_config(name), _stored_options(weights, name))
    if model_name.startswith(LOCAL):
        return read_open_clip_config(Path(model_name.removeprefix(LOCAL)).expanduser() / OPEN_CLIP_CONFIG_FILE)
    if model_name.startswith(HUB) and find_model(model_name) is None:
        return read_open_clip_config(download_file(model_name, OPEN_CLIP_CONFIG_FILE))
    return get_config(model_name)


def _is_folder(model_name: str) -> bool:
    return find_model(model_name) is None and Path(model_name).expanduser().is_dir()


def _run_of(folder: str) -> tuple[str, Path]:
    """The CLIP model of a run or checkpoint folder, by its name here, and its weights."""
    name, weights, *_ = read_checkpoint(Path(folder).expanduser(), average=True)
    known = find_model(name)
    if known is None:
        raise UserError(
            f"model_name must be a CLIP model or a run of one, got {folder!r}, a run of the image model {name!r}; "
            f"create_vision_model({name!r}, {folder!r}) loads it"
        )
    return known, weights


def _options(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the configuration, open_clip's names translated; None means as if not given."""
    options = {name: value for name, value in overrides.items() if name not in _SPELLINGS}
    for name, (part, option) in _SPELLINGS.items():
        if overrides.get(name) is not None:
            options[part] = {**options.get(part, {}), option: overrides[name]}
    return options


def _stored_options(weights: Path, model_name: str) -> dict[str, Any]:
    """The options stored next to a run's weights, if they are of this model."""
    options = read_model_options(weights)
    name = str(options.pop("name", ""))
    return options if (find_model(name) or name.partition(".")[0]) == model_name else {}


def _with_stored_preprocess(config: CLIPConfig, weights: Path, options: Mapping[str, Any]) -> CLIPConfig:
    """The preprocessing stored next to the weights, with the given overrides."""
    stored, asked = read_preprocess(weights), options.get("preprocess", {})
    if stored is None or not isinstance(asked, Mapping):
        return config
    return replace(config, preprocess=override(stored, asked, "preprocess."))


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
