"""Whole evaluations: from a loaded model and a data set to a stored result."""

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from evaclip.data import Source
from evaclip.data.config import DEFAULT_MAX_BAD_SHARE
from evaclip.eval import classify, probes, retrieval, zero_shot
from evaclip.eval.classify import ClassSpace, assign_labels
from evaclip.eval.features import FeatureOptions, ImageFeatures, encode_images, refuse_rest
from evaclip.eval.ranking import target_ranks, top_items
from evaclip.eval.results import DataFacts, Evaluation, Found, Gallery, ModelFacts, Query, Section, Task
from evaclip.eval.retrieval import EncodedPairs, encode_pairs
from evaclip.loading import LoadedClassifier, LoadedModel
from evaclip.redact import redacted
from evaclip.runs.files import EVALUATIONS_FOLDER, GALLERIES_FOLDER
from evaclip.weights.files import weights_hash, weights_kind

_ALLOW = "--allow-unreadable"


@dataclass(frozen=True)
class Setting:
    """Model, data and options of an evaluation.

    Attributes:
        loaded: the model; for `run_classify` a classifier, for `run_probe` either.
        path: of the data, as the user wrote it.
        source: the data, opened.
        title: name of the data in tables and reports.
        options: of the computation of features.
        allowed_unreadable: share of the samples that may be unreadable; more of them are refused.
    """

    loaded: LoadedModel | LoadedClassifier
    path: str
    source: Source
    title: str
    options: FeatureOptions = field(default_factory=FeatureOptions)
    allowed_unreadable: float = DEFAULT_MAX_BAD_SHARE


def run_zero_shot(setting: Setting, classnames: Sequence[str] | None, templates: Sequence[str]) -> Evaluation:
    """Zero-shot classification of a source with class names or label numbers as captions.

    Args:
        classnames: in label order; None takes the source's own, or else the distinct captions.
        templates: each with the placeholder `{}`.

    Raises:
        Refused: more samples than `setting` allows could not be read.
    """
    started = time.monotonic()
    loaded, options = _clip(setting), setting.options
    images = _encode(setting, setting.source)
    labels = assign_labels(images.captions, images.keys, classnames, setting.source.classes)
    classifier = zero_shot.build_classifier(loaded.model, loaded.tokenizer, labels.classnames, templates, options)
    result = zero_shot.evaluate(images.features, labels.indices, classifier, labels.classnames)
    prompts: dict[str, object] = {"classes": list(labels.classnames), "templates": list(templates)}
    return _evaluation("zero-shot", setting, result.to_dict(), started, len(images), prompts)


def run_retrieval(setting: Setting) -> tuple[Evaluation, Gallery]:
    """Retrieval both ways over all images and captions of a source, and a gallery of examples.

    Raises:
        Refused: more samples than `setting` allows could not be read.
    """
    started = time.monotonic()
    loaded = _clip(setting)
    pairs = encode_pairs(loaded.model, loaded.tokenizer, loaded.transform, setting.source, setting.options)
    refuse_rest(setting.source, pairs.unreadable, setting.allowed_unreadable, _ALLOW)
    result = retrieval.evaluate(pairs.image_features, pairs.text_features, pairs.image_of_text)
    readable = len(setting.source) - pairs.unreadable
    evaluation = _evaluation("retrieval", setting, result.to_dict(), started, readable)
    return evaluation, build_gallery(f"{setting.title}: captions and the images they retrieve", pairs)


def run_probe(
    task: Literal["linear-probe", "knn"], setting: Setting, train: Source, classnames: Sequence[str] | None
) -> Evaluation:
    """A linear probe, or k nearest neighbours, by the features of `train`, tested on the setting's source.

    Raises:
        Refused: more samples of either than `setting` allows could not be read.
    """
    started = time.monotonic()
    fitted, tested = _encode(setting, train), _encode(setting, setting.source)
    train_labels = assign_labels(fitted.captions, fitted.keys, classnames, train.classes)
    test_labels = assign_labels(tested.captions, tested.keys, train_labels.classnames, setting.source.classes)
    measure = probes.linear_probe if task == "linear-probe" else probes.knn
    result = measure(
        (fitted.features, train_labels.indices),
        (tested.features, test_labels.indices),
        classes=len(train_labels.classnames),
    )
    metrics = {**result.to_dict(), "train_unreadable": len(train) - len(fitted)}
    return _evaluation(task, setting, metrics, started, len(tested))


def run_classify(setting: Setting, classes: ClassSpace, real: Sequence[frozenset[int]] | None = None) -> Evaluation:
    """Classification of a source by the model's classifier.

    Args:
        classes: of captions and logits, from `class_space`.
        real: reassessed labels, from `load_real_labels`.

    Raises:
        Refused: more samples than `setting` allows could not be read.
    """
    started = time.monotonic()
    loaded, source = setting.loaded, setting.source
    assert isinstance(loaded, LoadedClassifier)
    predictions = classify.predict(loaded.model, loaded.transform, source, classes, setting.options)
    refuse_rest(source, len(source) - len(predictions), setting.allowed_unreadable, _ALLOW)
    result = classify.evaluate(predictions, classes, real)
    return _evaluation("classify", setting, result.to_dict(), started, len(predictions))


def build_gallery(title: str, pairs: EncodedPairs, *, queries: int = 8, per_query: int = 8, seed: int = 0) -> Gallery:
    """A gallery of two sections: queries drawn at random, and those answered best."""
    ranks = target_ranks(pairs.text_features, pairs.image_features, pairs.image_of_text)
    drawn = torch.randperm(len(ranks), generator=torch.Generator().manual_seed(seed))[:queries].tolist()
    best = _answered_best(pairs, ranks)[:queries]

    def answer(index: int) -> Query:
        items = top_items(pairs.text_features[index : index + 1], pairs.image_features, per_query)[1][0].tolist()
        target = int(pairs.image_of_text[index])
        shown = tuple(Found(pairs.key(item), item == target, thumbnail(pairs.picture(item))) for item in items)
        return Query(pairs.texts[index], int(ranks[index]) + 1, shown)

    sections = [Section("Drawn at random", f"Queries drawn with seed {seed}, not selected.", tuple(map(answer, drawn)))]
    if best:
        note = "The right image first, and by the widest margin."
        sections.append(Section("Answered best", note, tuple(map(answer, best))))
    return Gallery(title, len(pairs.image_features), tuple(sections))


def thumbnail(image: Image.Image, size: int = 80) -> str:
    """A small copy on white, as a data URI."""
    small = image.convert("RGBA")
    small.thumbnail((size, size))
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(small, ((size - small.width) // 2, (size - small.height) // 2), small)
    buffer = io.BytesIO()
    canvas.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _answered_best(pairs: EncodedPairs, ranks: Tensor) -> list[int]:
    """Captions that rank their image first, by the margin to the second; one caption per image."""
    scores = top_items(pairs.text_features, pairs.image_features, 2)[0]
    order = (scores[:, 0] - scores[:, -1]).argsort(descending=True, stable=True)
    best: dict[int, int] = {}
    for text in order[ranks[order] == 0].tolist():
        best.setdefault(int(pairs.image_of_text[text]), text)
    return list(best.values())


def store(run: Path, evaluation: Evaluation, gallery: Gallery | None = None) -> Path:
    """Write a result into the folder of its run, for the report; an earlier one of the same question is replaced."""
    name = evaluation.file_name
    evaluation.save(run / EVALUATIONS_FOLDER / name)
    if gallery:
        gallery.save(run / GALLERIES_FOLDER / name)
    return run / EVALUATIONS_FOLDER / name


def _clip(setting: Setting) -> LoadedModel:
    assert isinstance(setting.loaded, LoadedModel)
    return setting.loaded


def _encode(setting: Setting, source: Source) -> ImageFeatures:
    loaded = setting.loaded
    images = encode_images(loaded.model, loaded.transform, source, setting.options)
    refuse_rest(source, len(source) - len(images), setting.allowed_unreadable, _ALLOW)
    return images


def _evaluation(
    task: Task,
    setting: Setting,
    metrics: dict[str, object],
    started: float,
    samples: int,
    prompts: dict[str, object] | None = None,
) -> Evaluation:
    loaded, source = setting.loaded, setting.source
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    device = next(loaded.model.parameters()).device
    return Evaluation(
        task=task,
        title=setting.title,
        metrics=metrics,
        model=ModelFacts(
            loaded.name, loaded.origin, parameters, weights_hash(loaded.model), weights_kind(Path(loaded.origin))
        ),
        data=DataFacts(
            redacted(setting.path),
            source.fingerprint,
            samples,
            len(source) - samples,
            source.decoding.exif_orientation,
            source.decoding.min_size,
        ),
        transform=repr(loaded.transform),
        precision=setting.options.precision,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        seconds=time.monotonic() - started,
        prompts=prompts,
    )
