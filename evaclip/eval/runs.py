"""Whole evaluations: from a loaded model and a data set to a result that can be stored."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from evaclip.data import Source
from evaclip.eval import classify, knn, linear_probe, retrieval, zero_shot
from evaclip.eval.class_space import ClassSpace
from evaclip.eval.features import (
    ALLOWED_UNREADABLE,
    FeatureOptions,
    ImageFeatures,
    encode_images,
    refuse_rest,
    weights_hash,
)
from evaclip.eval.gallery import Gallery, build_gallery
from evaclip.eval.labels import assign_labels
from evaclip.eval.pairs import encode_pairs
from evaclip.eval.results import DataFacts, Evaluation, ModelFacts, Task
from evaclip.loading import LoadedClassifier, LoadedModel
from evaclip.redact import redacted
from evaclip.run_files import EVALUATIONS_FOLDER, GALLERIES_FOLDER

_ALLOW = "--allow-unreadable"


@dataclass(frozen=True)
class Setting:
    """What is common to all evaluations.

    Attributes:
        loaded: the model; for `run_classify` a classifier, for `run_linear_probe` and `run_knn` either.
        path: where the data lies, as the user wrote it.
        source: the data, opened.
        title: what the data is called in tables and reports.
        options: how features are computed.
        allowed_unreadable: share of the samples that may be unreadable; with more of them there is no result.
    """

    loaded: LoadedModel | LoadedClassifier
    path: str
    source: Source
    title: str
    options: FeatureOptions = field(default_factory=FeatureOptions)
    allowed_unreadable: float = ALLOWED_UNREADABLE


def run_zero_shot(setting: Setting, classnames: Sequence[str] | None, templates: Sequence[str]) -> Evaluation:
    """Zero-shot classification of a source whose captions are class names or label numbers.

    Args:
        classnames: in the order of the labels; None takes the source's own, or else the distinct captions.
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
    prompts = {"classes": len(labels.classnames), "templates": list(templates)}
    return _evaluation("zero-shot", setting, result.to_dict(), started, len(images), prompts)


def run_retrieval(setting: Setting) -> tuple[Evaluation, Gallery]:
    """Retrieval both ways over all pictures and captions of a source, and a gallery of what was found.

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
    return evaluation, build_gallery(f"{setting.title}: texts and what they find", pairs)


def run_linear_probe(setting: Setting, train: Source, classnames: Sequence[str] | None) -> Evaluation:
    """A linear probe trained on the features of `train` and tested on those of the setting's source.

    Raises:
        Refused: more samples of either than `setting` allows could not be read.
    """
    return _by_features("linear-probe", setting, train, classnames)


def run_knn(setting: Setting, train: Source, classnames: Sequence[str] | None) -> Evaluation:
    """The same by votes of the nearest of `train`."""
    return _by_features("knn", setting, train, classnames)


def _by_features(
    task: Literal["linear-probe", "knn"], setting: Setting, train: Source, classnames: Sequence[str] | None
) -> Evaluation:
    started = time.monotonic()
    fitted, tested = _encode(setting, train), _encode(setting, setting.source)
    train_labels = assign_labels(fitted.captions, fitted.keys, classnames, train.classes)
    test_labels = assign_labels(tested.captions, tested.keys, train_labels.classnames, setting.source.classes)
    measure = linear_probe.linear_probe if task == "linear-probe" else knn.knn
    result = measure(
        (fitted.features, train_labels.indices),
        (tested.features, test_labels.indices),
        classes=len(train_labels.classnames),
    )
    metrics = {**result.to_dict(), "train_unreadable": len(train) - len(fitted)}
    return _evaluation(task, setting, metrics, started, len(tested))


def run_classify(setting: Setting, classes: ClassSpace, real: Sequence[frozenset[int]] | None = None) -> Evaluation:
    """Classification of a source by the model's own classifier.

    Args:
        classes: what captions and logits stand for, from `class_space`.
        real: reassessed labels, from `load_real_labels`.

    Raises:
        Refused: more samples than `setting` allows could not be read.
    """
    started = time.monotonic()
    loaded, source = setting.loaded, setting.source
    assert isinstance(loaded, LoadedClassifier)
    found = classify.predict(loaded.model, loaded.transform, source, classes, setting.options)
    refuse_rest(source, len(source) - len(found), setting.allowed_unreadable, _ALLOW)
    result = classify.evaluate(found, classes, real)
    return _evaluation("classify", setting, result.to_dict(), started, len(found))


def store(run: Path, evaluation: Evaluation, gallery: Gallery | None = None) -> Path:
    """Keeps a result in the folder of its run, for its report; one of the same name is replaced."""
    name = f"{evaluation.task}-{re.sub(r'[^a-z0-9]+', '-', evaluation.title.lower()).strip('-')}.json"
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
        model=ModelFacts(loaded.name, loaded.origin, parameters, weights_hash(loaded.model)),
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
