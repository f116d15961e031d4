"""Zero-shot classification: pictures against each class's mean prompt (arXiv 2103.00020, section 3.1)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from evaclip.errors import UserError
from evaclip.eval.features import FeatureOptions, ImageTextModel, Tokenizer, encode_texts
from evaclip.eval.prompts import PLACEHOLDER, prompts
from evaclip.eval.ranking import Result, hit_rate, target_ranks, top_items


@dataclass(frozen=True)
class ClassResult:
    """One class: the share of its pictures that were found, and the class they were most often taken for."""

    name: str
    samples: int
    top1: float
    top5: float
    mistaken_for: str | None


@dataclass(frozen=True)
class ZeroShotResult(Result):
    """Accuracies are shares in [0, 1]; classes without pictures take no part in the mean per class.

    Attributes:
        chance_top1: the accuracy of guessing, 1 / classes.
        chance_top5: min(1, 5 / classes).
        per_class: the classes that have pictures, in the order of the labels.
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
    """One feature per class: every prompt encoded and normalised, their mean, normalised again.

    Returns:
        [classes, embed_dim] float32 on the CPU.
    """
    texts = [text for name in classnames for text in prompts(name, templates)]
    features = encode_texts(model, tokenizer, texts, options)
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
    """`build_classifier` as open_clip spells it: one column per class.

    Args:
        templates: texts with `{}`, or functions from a class's name to a sentence.
        num_classes_per_batch: classes that are encoded at once; None for all.
        device: of the result; None for the model's.
        use_tqdm: show a bar, on a terminal.

    Returns:
        `[embed_dim, classes]` in the dtype of the model's parameters.

    Raises:
        UserError: without classes or templates, or for a template without a place for the class.

    Example:
        `classifier = evaclip.build_zero_shot_classifier(model, tokenizer, ["cat", "dog"], ["a photo of a {}."])`
    """
    texts = [template if isinstance(template, str) else template(PLACEHOLDER) for template in templates]
    for text in texts:
        if PLACEHOLDER not in text:
            raise UserError(f"template {text!r} lacks the placeholder {PLACEHOLDER}")
    if not texts or not classnames:
        raise UserError(f"expected classes and templates, got {len(classnames)} and {len(texts)}")
    assert isinstance(model, nn.Module)
    parameter = next(model.parameters())
    options = FeatureOptions(batch_size=len(texts) * (num_classes_per_batch or len(classnames)), progress=use_tqdm)
    classifier = build_classifier(model, tokenizer, classnames, texts, options)
    return classifier.T.to(device or parameter.device, parameter.dtype)


def evaluate(features: Tensor, labels: Tensor, classifier: Tensor, classnames: Sequence[str]) -> ZeroShotResult:
    """Top-1, top-5 and mean-per-class accuracy of normalised picture features.

    Among classes of equal score the one with the lower label counts as the better.

    Args:
        features: [N, embed_dim].
        labels: [N] int64 in [0, classes).
        classifier: [classes, embed_dim], from `build_classifier`.
        classnames: their names.
    """
    if not len(labels):
        raise UserError("there are no labelled pictures to classify")
    if len(classnames) != len(classifier):
        raise ValueError(f"expected {len(classifier)} class names, got {len(classnames)}")
    ranks = target_ranks(features, classifier, labels)
    predictions = top_items(features, classifier, 1)[1][:, 0]
    return summarize(ranks, predictions, labels, classnames, len(classnames))


def summarize(
    ranks: Tensor, predictions: Tensor, labels: Tensor, classnames: Sequence[str], classes: int
) -> ZeroShotResult:
    """The accuracies that follow from ranks.

    Args:
        ranks: [N] the place (0 is best) of each picture's own class; from 5 on they are all the same.
        predictions: [N] int64, the classes that the pictures were taken for.
        labels: [N] int64, their own.
        classnames: by label.
        classes: how many there are to choose among.
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
