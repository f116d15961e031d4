"""From what a user names, a run, a checkpoint or a model, to a model with its tokenizer and transform."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evaclip.errors import UserError
from evaclip.factory import create_model, create_vision_model
from evaclip.model.clip import CLIP
from evaclip.model.config import find_model
from evaclip.model.vision_model import VisionModel
from evaclip.model.vision_names import RELEASES, is_vision_model, split_name
from evaclip.run_files import CLASSES_FILE, CONFIG_FILE, EMA_FILE, MODEL_CONFIG_FILE, PREPROCESS_FILE
from evaclip.tokenizer import Tokenizer
from evaclip.transforms import EvalTransform, OpaqueTransform
from evaclip.weights import find_weights
from evaclip.weights.files import classifier_size
from evaclip.weights.hub import HUB, LOCAL
from evaclip.weights.parts import is_there
from evaclip.zoo import list_pretrained_tags_by_model

RANDOM = "random weights"
"""The origin of the weights of a model that is named without any."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with what its inputs need.

    Attributes:
        name: of the configuration.
        origin: where the weights come from.
        run: the folder of the run that it belongs to, if it belongs to one.
    """

    name: str
    origin: str
    model: CLIP
    tokenizer: Tokenizer
    transform: EvalTransform
    run: Path | None = None


@dataclass(frozen=True)
class LoadedClassifier:
    """An image model with its classifier, and what its pictures go through; the rest as for `LoadedModel`."""

    name: str
    origin: str
    model: VisionModel
    transform: EvalTransform
    run: Path | None = None


@dataclass(frozen=True)
class FoundClassifier:
    """A classifier that is there and isn't loaded yet.

    Attributes:
        name: timm's.
        weights: their file; None for random ones.
        num_classes: of the classifier; 0 without one.
        classes: their names by label, where a training left them.
        options: of `create_vision_model`.
        run: the folder of the run that it belongs to, if it belongs to one.
    """

    name: str
    weights: Path | None
    num_classes: int
    options: dict[str, Any] = field(default_factory=dict)
    run: Path | None = None
    classes: tuple[str, ...] | None = None

    def load(
        self,
        *,
        device: str = "cpu",
        image_size: int | tuple[int, int] | None = None,
        crop: float | None = None,
        antialias: bool = False,
    ) -> LoadedClassifier:
        """The model, in fp32.

        Args:
            device: where it runs.
            image_size: of the pictures, as side or height and width; None for that of the model.
            crop: share of the side that the centre crop keeps; None for that of the weights.
            antialias: resize positions as timm does, see `create_vision_model`.

        Raises:
            UserError: for a size, a share or weights that don't fit the model.
        """
        options = self.options if image_size is None else {**self.options, "image_size": image_size}
        model = create_vision_model(self.name, self.weights or False, device=device, antialias=antialias, **options)
        preprocess = model.preprocess if crop is None else replace(model.preprocess, crop=crop)
        transform = OpaqueTransform(model.config.image_size, preprocess)
        return LoadedClassifier(self.name, str(self.weights or RANDOM), model, transform, self.run)


def find_classifier(given: str, *, average: bool = True) -> FoundClassifier:
    """Looks for the classifier that `given` names.

    Args:
        given: a run folder or a checkpoint folder of an image model (its `model.json` has timm's name of it and
            options of `create_vision_model`), `hf-hub:timm/NAME`, or NAME[:WEIGHTS] with timm's NAME, where WEIGHTS is
            a file, a folder or `hf-hub:OWNER/NAME`; a NAME alone has random weights.
        average: of a checkpoint that holds averaged weights too, take those.

    Raises:
        UserError: it is none of these, or a CLIP model.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        name, weights, options, run = read_checkpoint(path, average)
        _require_classifier(name)
        count = options.get("num_classes") or classifier_size(weights)
        names = weights.with_name(CLASSES_FILE)
        classes = tuple(json.loads(names.read_text(encoding="utf-8"))) if names.exists() else None
        return FoundClassifier(name, weights, count, options, run, classes)
    name, _, source = (given, "", given) if given.startswith(HUB) else given.partition(":")
    if find_model(name) is None and not is_vision_model(name) and len(path.parts) > 1:
        raise UserError(f"there is no folder {given!r}; give a run folder, a checkpoint folder or NAME[:WEIGHTS]")
    _require_classifier(name)
    if not source:
        architecture, tag = split_name(name)
        releases = RELEASES[architecture]
        return FoundClassifier(name, None, releases[tag or next(iter(releases))].num_classes)
    weights = find_weights(source, name)
    return FoundClassifier(name, weights, classifier_size(weights))


def _require_classifier(name: str) -> None:
    if find_model(name) is not None:
        raise UserError(f"{name!r} is a CLIP model, which has no classifier: `evaclip eval zero-shot` measures it")
    split_name(name)


def load_features(given: str, *, device: str = "cpu", average: bool = True) -> "LoadedModel | LoadedClassifier":
    """Loads a CLIP as `load_model` does, or an image model as `find_classifier` finds it, for features of pictures."""
    path = Path(given).expanduser()
    name = read_checkpoint(path, average)[0] if path.is_dir() else given
    name = name if name.startswith(HUB) else name.partition(":")[0]
    if find_model(name) is None and is_vision_model(name):
        loaded = find_classifier(given, average=average).load(device=device)
        # On white, as features are everywhere else.
        return replace(loaded, transform=EvalTransform(loaded.model.config.image_size, loaded.model.preprocess))
    return load_model(given, device=device, average=average)


def load_model(given: str, *, device: str = "cpu", average: bool = True, random: bool = True) -> LoadedModel:
    """Loads what `given` names, in fp32.

    Args:
        given: a run folder (its latest checkpoint), a checkpoint folder, `hf-hub:OWNER/NAME`, `local-dir:FOLDER`, or
            NAME[:WEIGHTS], where WEIGHTS is the tag of released weights, a file or a folder; a NAME alone has random
            weights.
        device: where the model runs.
        average: of a checkpoint that holds averaged weights too, take those.
        random: whether random weights are meant by a NAME alone.

    Raises:
        UserError: it is none of these, or a NAME alone that isn't to have random weights.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        return _load_checkpoint(path, device, average)
    if given.startswith((HUB, LOCAL)):
        return _loaded(given, given, create_model(given, device=device))
    name, _, weights = given.partition(":")
    if find_model(name) is None and len(path.parts) > 1:
        raise UserError(f"there is no folder {given!r}; give a run folder, a checkpoint folder or NAME[:WEIGHTS]")
    if not (weights or random) and find_model(name):
        tags = ", ".join(list_pretrained_tags_by_model(name)) or "none"
        raise UserError(
            f"the model {given!r} has random weights, whose embeddings find nothing: give NAME:WEIGHTS or a run;"
            f" released weights of {name}: {tags}"
        )
    model = create_model(name, pretrained=weights or None, device=device)
    return _loaded(name, weights or RANDOM, model)


def _load_checkpoint(folder: Path, device: str, average: bool) -> LoadedModel:
    name, weights, options, run = read_checkpoint(folder, average)
    if is_vision_model(name):
        raise UserError(
            f"{str(folder)!r} holds an image model, which knows no texts: `evaclip eval classify`, `linear-probe` and "
            "`knn` measure it"
        )
    return _loaded(name, str(weights), create_model(name, pretrained=weights, device=device, **options), run)


def read_checkpoint(folder: Path, average: bool) -> tuple[str, Path, dict[str, Any], Path | None]:
    """What a run or checkpoint folder holds: the model's name, its weights, options of `create_model`, and the run.

    Args:
        average: where there are averaged weights too, take those.

    Raises:
        UserError: there is no checkpoint, or it doesn't tell its model.
    """
    weights = find_weights(folder, "")
    checkpoint = weights.parent
    if average and is_there(checkpoint / EMA_FILE):
        weights = checkpoint / EMA_FILE
    options = _model_options(checkpoint / MODEL_CONFIG_FILE)
    name = str(options.pop("name"))
    if (checkpoint / PREPROCESS_FILE).is_file():
        options.pop("preprocess", None)
    run = folder if (folder / CONFIG_FILE).is_file() else checkpoint.parent.parent
    return name, weights, options, run if (run / CONFIG_FILE).is_file() else None


def _model_options(path: Path) -> dict[str, Any]:
    try:
        options: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise UserError(
            f"{path} cannot be read, so that the model of this checkpoint is not known ({exc}); "
            f"give it as NAME:{path.parent}"
        ) from exc
    return options


def _loaded(name: str, origin: str, model: CLIP, run: Path | None = None) -> LoadedModel:
    transform = EvalTransform(model.config.vision.image_size, model.config.preprocess)
    return LoadedModel(
        name, origin, model, Tokenizer(model.config.text.context_length, model.config.text.vocab_size), transform, run
    )
