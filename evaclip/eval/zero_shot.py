"""Zero-shot classification: class names, prompts, and images against each class's mean prompt (arXiv 2103.00020)."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from evaclip.errors import UserError
from evaclip.eval.features import FeatureOptions, ImageTextModel, Tokenizer, encode_texts
from evaclip.eval.ranking import Result, hit_rate, target_ranks, top_items

IMAGENET = "imagenet"
PLACEHOLDER = "{}"

IMAGENET_CLASSNAMES: Sequence[str]
"""open_clip's list of the 1,000 cleaned class names, in label order."""
OPENAI_IMAGENET_TEMPLATES: Sequence[Callable[[str], str]]
"""open_clip's 80 templates of the CLIP paper, functions from a class name to a sentence."""
SIMPLE_IMAGENET_TEMPLATES: Sequence[Callable[[str], str]]
"""The 7 of them that do nearly as well."""
_FROM_OPEN_CLIP = ("IMAGENET_CLASSNAMES", "OPENAI_IMAGENET_TEMPLATES", "SIMPLE_IMAGENET_TEMPLATES")


def __getattr__(name: str) -> Any:
    if name not in _FROM_OPEN_CLIP:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_open_clip_data(), name)


def imagenet_classnames() -> tuple[str, ...]:
    """The 1,000 cleaned ImageNet class names, in label order."""
    return tuple(_open_clip_data().IMAGENET_CLASSNAMES)


def imagenet_templates() -> tuple[str, ...]:
    """The 80 prompt templates of the CLIP paper (arXiv 2103.00020, section 3.1.4)."""
    return tuple(template(PLACEHOLDER) for template in _open_clip_data().OPENAI_IMAGENET_TEMPLATES)


def load_classnames(source: str | Path) -> tuple[str, ...]:
    """Class names of `imagenet`, or of a file with one a line (or a JSON list), in label order.

    Raises:
        UserError: no such file, or an empty name (with its line).
    """
    if str(source) == IMAGENET:
        return imagenet_classnames()
    return tuple(name for _, name in _read_list(Path(source), "class names"))


def load_templates(source: str | Path) -> tuple[str, ...]:
    """Templates of `imagenet`, a template itself (a string with `{}`), or those of a file (lines or a JSON list).

    Raises:
        UserError: no such file, or a template without the placeholder `{}` (with its line).
    """
    if str(source) == IMAGENET:
        return imagenet_templates()
    if PLACEHOLDER in str(source):
        return (str(source),)
    entries = _read_list(Path(source), "templates", f", or one template with {PLACEHOLDER}")
    for where, template in entries:
        if PLACEHOLDER not in template:
            raise UserError(f"{source}, {where}: template {template!r} lacks the placeholder {PLACEHOLDER}")
    return tuple(template for _, template in entries)


def read_text(path: Path, what: str, hint: str = "") -> str:
    """Contents of a UTF-8 file.

    Raises:
        UserError: it can't be read; `what` names its contents, `hint` ends the message.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read {what} from {str(path)!r}: {reason}{hint}") from exc


def _read_list(path: Path, what: str, alternative: str = "") -> list[tuple[str, str]]:
    """Position and text of every entry."""
    text = read_text(path, what, f"; give a file with one a line, a JSON list, or 'imagenet'{alternative}")
    place, values = "line", text.rstrip().splitlines()
    if path.suffix == ".json":
        try:
            place, values = "entry", json.loads(text)
        except ValueError as exc:
            raise UserError(f"{path} must be valid JSON: {exc}") from exc
        if not isinstance(values, list):
            raise UserError(f"{path} must be a JSON list of strings, got a {type(values).__name__}")
    for number, value in enumerate(values, 1):
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{path}, {place} {number}: must be one of the {what}, got {value!r}")
    if not values:
        raise UserError(f"{path} holds no {what}")
    return [(f"{place} {number}", value.strip()) for number, value in enumerate(values, 1)]


@cache
def _open_clip_data() -> ModuleType:
    """open_clip's data file as a separate module, without importing the open_clip package."""
    package = importlib.util.find_spec("open_clip")
    path = Path(package.origin).with_name("zero_shot_metadata.py") if package and package.origin else None
    if path is None or not path.is_file():
        raise UserError(
            "ImageNet's class names and templates come from a package that is not installed: "
            "pip install 'open_clip_torch>=3.3'"
        )
    spec = importlib.util.spec_from_file_location("evaclip.eval._imagenet_prompts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class ClassResult:
    """Accuracies of one class, and the class most often predicted in its place."""

    name: str
    samples: int
    top1: float
    top5: float
    mistaken_for: str | None


@dataclass(frozen=True)
class ZeroShotResult(Result):
    """Accuracies in [0, 1]; the mean per class is over classes that have images.

    Attributes:
        chance_top1: the accuracy of guessing, 1 / classes.
        chance_top5: min(1, 5 / classes).
        per_class: the classes that have images, in label order.
    """

    samples: int
    classes: int
    top1: float
    top5: float
    mean_per_class: float
    chance_top1: float
    chance_top5: float
    per_class: tuple[ClassResult, ...]


def build_classifier(
    model: ImageTextModel,
    tokenizer: Tokenizer,
    classnames: Sequence[str],
    templates: Sequence[str],
    options: FeatureOptions | None = None,
) -> Tensor:
    """One feature per class: every prompt encoded and normalized, their mean, normalized again.

    Returns:
        [classes, embed_dim] float32 on the CPU.
    """
    prompts = [template.replace(PLACEHOLDER, name) for name in classnames for template in templates]
    features = encode_texts(model, tokenizer, prompts, options)
    return normalize(features.view(len(classnames), len(templates), -1).mean(1), dim=-1)


def build_zero_shot_classifier(
    model: ImageTextModel,
    tokenizer: Tokenizer,
    classnames: Sequence[str],
    templates: Sequence[str | Callable[[str], str]],
    num_classes_per_batch: int | None = 10,
    device: str | torch.device | None = None,
    use_tqdm: bool = False,
) -> Tensor:
    """`build_classifier` with open_clip's signature: one column per class.

    Args:
        templates: strings with `{}`, or functions from a class name to a sentence.
        num_classes_per_batch: classes that are encoded at once; None for all.
        device: of the result; None for the model's.
        use_tqdm: show a progress bar, on a terminal.

    Returns:
        `[embed_dim, classes]` in the dtype of the model's parameters.

    Raises:
        UserError: without classes or templates, or for a template without a placeholder.

    Example:
        `classifier = evaclip.build_zero_shot_classifier(model, tokenizer, ["cat", "dog"], ["a photo of a {}."])`
    """
    strings = [template if isinstance(template, str) else template(PLACEHOLDER) for template in templates]
    for template in strings:
        if PLACEHOLDER not in template:
            raise UserError(f"template {template!r} lacks the placeholder {PLACEHOLDER}")
    if not strings or not classnames:
        raise UserError(f"expected classes and templates, got {len(classnames)} and {len(strings)}")
    assert isinstance(model, nn.Module)
    parameter = next(model.parameters())
    options = FeatureOptions(batch_size=len(strings) * (num_classes_per_batch or len(classnames)), progress=use_tqdm)
    classifier = build_classifier(model, tokenizer, classnames, strings, options)
    return classifier.T.to(device or parameter.device, parameter.dtype)


def evaluate(features: Tensor, labels: Tensor, classifier: Tensor, classnames: Sequence[str]) -> ZeroShotResult:
    """Top-1, top-5 and mean-per-class accuracy of normalized image features.

    Among classes of equal score the one with the lower label wins.

    Args:
        features: [N, embed_dim].
        labels: [N] int64 in [0, classes).
        classifier: [classes, embed_dim], from `build_classifier`.
        classnames: by label.
    """
    if not len(labels):
        raise UserError("there are no labelled images to classify")
    if len(classnames) != len(classifier):
        raise ValueError(f"expected {len(classifier)} class names, got {len(classnames)}")
    ranks = target_ranks(features, classifier, labels)
    predictions = top_items(features, classifier, 1)[1][:, 0]
    return summarize(ranks, predictions, labels, classnames, len(classnames))


def summarize(
    ranks: Tensor, predictions: Tensor, labels: Tensor, classnames: Sequence[str], classes: int
) -> ZeroShotResult:
    """Accuracies from ranks.

    Args:
        ranks: [N] rank (0 is best) of each image's true class; all ranks from 5 on are equivalent.
        predictions: [N] int64, the predicted classes.
        labels: [N] int64, the true classes.
        classnames: by label.
        classes: number of classes to choose among.
    """
    per_class = tuple(
        _class_result(label, classnames, ranks[labels == label], predictions[labels == label])
        for label in torch.bincount(labels).nonzero().flatten().tolist()
    )
    return ZeroShotResult(
        samples=len(labels),
        classes=classes,
        top1=hit_rate(ranks, 1),
        top5=hit_rate(ranks, 5),
        mean_per_class=sum(result.top1 for result in per_class) / len(per_class),
        chance_top1=1 / classes,
        chance_top5=min(1.0, 5 / classes),
        per_class=per_class,
    )


def _class_result(label: int, classnames: Sequence[str], ranks: Tensor, predictions: Tensor) -> ClassResult:
    wrong = predictions[predictions != label]
    mistaken_for = classnames[int(torch.bincount(wrong).argmax())] if len(wrong) else None
    return ClassResult(classnames[label], len(ranks), hit_rate(ranks, 1), hit_rate(ranks, 5), mistaken_for)
