"""Load a run, a checkpoint or a named model with its tokenizer and transform."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evaclip.errors import UserError
from evaclip.factory import create_model, create_vision_model, list_pretrained_tags_by_model, tokenizer_of
from evaclip.model.clip import CLIP
from evaclip.model.config import find_model
from evaclip.model.hf_text import HFTokenizer
from evaclip.model.vision_model import VisionModel
from evaclip.model.vision_names import RELEASES, is_vision_model, split_name
from evaclip.runs.files import CLASSES_FILE
from evaclip.tokenizer import Tokenizer
from evaclip.transforms import EvalTransform, OpaqueTransform, PackedTransform, image_transform
from evaclip.weights import find_weights
from evaclip.weights.files import classifier_size, read_checkpoint, read_model_options
from evaclip.weights.hub import HUB, LOCAL

RANDOM = "random weights"
"""Origin of the weights of a model that is named without weights."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer and transform.

    Attributes:
        name: of the configuration.
        origin: file or name of the weights.
        run: folder of its run; None without one.
    """

    name: str
    origin: str
    model: CLIP
    tokenizer: Tokenizer | HFTokenizer
    transform: EvalTransform | PackedTransform
    run: Path | None = None


@dataclass(frozen=True)
class LoadedClassifier:
    """An image model with its classifier and its transform; the rest as for `LoadedModel`."""

    name: str
    origin: str
    model: VisionModel
    transform: EvalTransform
    run: Path | None = None


@dataclass(frozen=True)
class FoundClassifier:
    """A classifier that isn't loaded yet.

    Attributes:
        name: timm's name of the model.
        weights: file of the weights; None for random ones.
        num_classes: number of classes; 0 without a classifier.
        options: options for `create_vision_model`.
        run: folder of its run; None without one.
        classes: class names by label from its training; None without them.
        eval_size: side of images in the release's evaluation; None for the model's.
    """

    name: str
    weights: Path | None
    num_classes: int
    options: dict[str, Any] = field(default_factory=dict)
    run: Path | None = None
    classes: tuple[str, ...] | None = None
    eval_size: int | None = None

    def load(
        self,
        *,
        device: str = "cpu",
        image_size: int | tuple[int, int] | None = None,
        crop: float | None = None,
        antialias: bool = False,
    ) -> LoadedClassifier:
        """Load the model in fp32.

        Args:
            device: of the model.
            image_size: side, or height and width; None for the model's.
            crop: share of the side that the centre crop keeps; None for the weights' own.
            antialias: resize positions as timm does, also without `pos_antialias` of the model.

        Raises:
            UserError: for a size, a share or weights that don't fit the model.
        """
        options = self.options if image_size is None else {**self.options, "image_size": image_size}
        if antialias:
            options = {**options, "pos_antialias": True}
        model = create_vision_model(self.name, self.weights or False, device=device, **options)
        preprocess = model.preprocess if crop is None else replace(model.preprocess, crop=crop)
        transform = OpaqueTransform(model.config.image_size, preprocess)
        return LoadedClassifier(self.name, str(self.weights or RANDOM), model, transform, self.run)


def find_classifier(source: str, *, average: bool = True) -> FoundClassifier:
    """Find a classifier without loading it.

    Args:
        source: a run folder or a checkpoint folder of an image model (its `model.json` has timm's name and options of
            `create_vision_model`), `hf-hub:timm/NAME`, or NAME[:WEIGHTS] with timm's NAME, where WEIGHTS is a file, a
            folder or `hf-hub:OWNER/NAME`; a NAME alone has random weights.
        average: as for `find_weights`.

    Raises:
        UserError: it is none of these, or a CLIP model.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        name, weights, options, run = read_checkpoint(path, average)
        _require_classifier(name)
        count = options.get("num_classes") or classifier_size(weights)
        names = weights.with_name(CLASSES_FILE)
        classes = tuple(json.loads(names.read_text(encoding="utf-8"))) if names.exists() else None
        return FoundClassifier(name, weights, count, options, run, classes)
    name, weights_source = _split(source)
    _require_classifier(name)
    architecture, tag = split_name(name)
    release = RELEASES[architecture][tag or next(iter(RELEASES[architecture]))]
    if not weights_source:
        return FoundClassifier(name, None, release.num_classes, eval_size=release.eval_size)
    weights = find_weights(weights_source, name, average=average)
    # Weights of a training have a size of their own.
    size = None if read_model_options(weights) else release.eval_size
    return FoundClassifier(name, weights, classifier_size(weights), eval_size=size)


def _split(source: str) -> tuple[str, str]:
    """The model and the source of its weights, of NAME[:WEIGHTS] or `hf-hub:OWNER/NAME`."""
    name, _, weights = (source, "", source) if source.startswith(HUB) else source.partition(":")
    if find_model(name) is None and not is_vision_model(name) and len(Path(source).parts) > 1:
        raise UserError(f"there is no folder {source!r}; give a run folder, a checkpoint folder or NAME[:WEIGHTS]")
    return name, weights


def _require_classifier(name: str) -> None:
    if find_model(name) is not None:
        raise UserError(f"{name!r} is a CLIP model, which has no classifier: `evaclip eval zero-shot` measures it")
    split_name(name)


def load_features(source: str, *, device: str = "cpu", average: bool = True) -> "LoadedModel | LoadedClassifier":
    """Load a CLIP as `load_model`, or an image model as `find_classifier`, for image features."""
    path = Path(source).expanduser()
    name = read_checkpoint(path, average)[0] if path.is_dir() else source
    name = name if name.startswith(HUB) else name.partition(":")[0]
    if find_model(name) is None and is_vision_model(name):
        loaded = find_classifier(source, average=average).load(device=device)
        # Transparent images on white, as for all features.
        return replace(loaded, transform=EvalTransform(loaded.model.config.image_size, loaded.model.preprocess))
    return load_model(source, device=device, average=average)


def load_model(source: str, *, device: str = "cpu", average: bool = True, random: bool = True) -> LoadedModel:
    """Load a model in fp32.

    Args:
        source: a run folder (its latest checkpoint), a checkpoint folder, `hf-hub:OWNER/NAME`, `local-dir:FOLDER`, or
            NAME[:WEIGHTS], where WEIGHTS is the tag of released weights, a file or a folder; a NAME alone has random
            weights.
        device: of the model.
        average: as for `find_weights`.
        random: allow random weights, for a NAME alone.

    Raises:
        UserError: it is none of these, or random weights aren't allowed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_checkpoint(path, device, average)
    if source.startswith((HUB, LOCAL)):
        return _loaded(source, source, create_model(source, device=device))
    name, weights = _split(source)
    if not (weights or random) and find_model(name):
        tags = ", ".join(list_pretrained_tags_by_model(name)) or "none"
        raise UserError(
            f"the model {source!r} has random weights and its embeddings are useless: give NAME:WEIGHTS or a run;"
            f" released weights of {name}: {tags}"
        )
    if weights and Path(weights).expanduser().is_dir():  # `origin` names the file
        weights = str(find_weights(weights, name, average=average))
    model = create_model(name, pretrained=weights or None, device=device)
    return _loaded(name, weights or RANDOM, model)


def _load_checkpoint(folder: Path, device: str, average: bool) -> LoadedModel:
    name, weights, options, run = read_checkpoint(folder, average)
    if is_vision_model(name):
        raise UserError(
            f"{str(folder)!r} holds an image model without a text tower: `evaclip eval classify`, `linear-probe` and "
            "`knn` measure it"
        )
    return _loaded(name, str(weights), create_model(name, pretrained=weights, device=device, **options), run)


def _loaded(name: str, origin: str, model: CLIP, run: Path | None = None) -> LoadedModel:
    transform = image_transform(model.config.vision, model.config.preprocess)
    return LoadedModel(name, origin, model, tokenizer_of(model.config.text), transform, run)
