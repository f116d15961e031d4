"""Classification: labels of a data set, the classes of a classifier, and top-1 and top-5 as timm's `validate`."""

import json
import operator
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from evaclip.data import EvalBatch, Source
from evaclip.errors import UserError, require_finite, unknown_name
from evaclip.eval.features import FeatureOptions, for_each_batch
from evaclip.eval.ranking import Result, hit_rate
from evaclip.eval.zero_shot import IMAGENET, ZeroShotResult, read_text, summarize

TOP = 5
IN1K = "in1k"
_IN1K_NAME = "imagenet-1k"
_VALIDATION_IMAGES = 50_000
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})(\.\w+)?$")


@dataclass(frozen=True)
class Labels:
    """Class indices `[N]` int64 into `classnames`."""

    indices: Tensor
    classnames: tuple[str, ...]


def assign_labels(
    captions: Sequence[str], keys: Sequence[str], classnames: Sequence[str] | None = None, folders: Sequence[str] = ()
) -> Labels:
    """Map the caption of each sample to a class index.

    A caption is the name of its class, or the index of the class in `classnames` (as `.cls` members have it). Names
    are compared as they are, and then without case and with `_` as a space. Without `classnames`, numbers are names.
    If all names are numbers but not their own indices (classes 0, 2, 5), every number is a name.

    Args:
        captions: one per sample.
        keys: names of the samples, for error messages.
        classnames: in label order; None takes `folders`, or else the distinct captions, sorted.
        folders: names that the source itself has for all classes, in label order. If one of them is a class name, all
            must be. If none is (as for ImageNet), the n-th folder is the n-th class, with a warning. Numeric folders
            are labels (as for ImageNet-V2): folder 10 is class 10, though it sorts before 2.

    Raises:
        UserError: a caption or folder that is not a class, with the nearest names.
    """
    if classnames is None:
        classnames = folders or _distinct(captions)
    classes = _ClassNames(classnames)
    unknown = [] if all(map(str.isdecimal, folders)) else [name for name in folders if not classes.find(name)]
    if unknown:
        _check_folders(folders, unknown, classnames)
        classes = _ClassNames(folders)
    names = classes.names
    are_names = all(map(str.isdecimal, names)) and list(map(int, names)) != list(range(len(names)))
    numbers = 0 if are_names else len(names)
    indices = [_index(caption, key, classes, numbers) for caption, key in zip(captions, keys, strict=True)]
    return Labels(torch.tensor(indices, dtype=torch.int64), tuple(classnames))


def _distinct(captions: Sequence[str]) -> list[str]:
    names = set(captions)
    numeric = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name) if numeric else 0, name))


class _ClassNames:
    """Class names in label order, found as they are or normalised."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._exact, self._normalised = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
        for index, name in enumerate(names):
            self._exact[name].append(index)
            self._normalised[_normalised(name)].append(index)

    def find(self, name: str) -> list[int]:
        """Indices of the classes of a name; several if they have the same name, as in ImageNet."""
        return self._exact.get(name) or self._normalised.get(_normalised(name), [])


def _normalised(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


def _check_folders(folders: Sequence[str], unknown: Sequence[str], classnames: Sequence[str]) -> None:
    """Accept folders as classes by their position: none of them is a class name, and there are as many."""
    if len(unknown) < len(folders):
        listed = ", ".join(map(repr, unknown[:10])) + (" ..." if len(unknown) > 10 else "")
        raise UserError(
            f"class folders must all be class names, or none, got {len(unknown)} of {len(folders)} that are none:"
            f" {listed}; the class names are {', '.join(map(repr, classnames[:10]))}"
            + (" ..." if len(classnames) > 10 else "")
        )
    if len(folders) != len(classnames):
        raise UserError(
            f"there are {len(classnames)} class names for {len(folders)} folders of other names"
            f" (such as {folders[0]!r}): give one name per folder, in their sorted order"
        )
    # `warnings` shows this once, however many batches are labelled.
    warnings.warn(
        f"no class folder has a class name, so they are matched by position: the first folder, {folders[0]!r}, is"
        f" {classnames[0]!r}, the last one, {folders[-1]!r}, is {classnames[-1]!r}",
        stacklevel=3,
    )


def _index(caption: str, key: str, classes: _ClassNames, numbers: int) -> int:
    indices = classes.find(caption)
    if len(indices) > 1:
        raise UserError(f"several classes are called {caption!r}: label by number or by folder")
    if indices:
        return indices[0]
    if numbers and caption.isdecimal():
        if int(caption) < numbers:
            return int(caption)
        raise UserError(f"sample {key!r} has label {caption}, but the {numbers} classes are 0..{numbers - 1}")
    raise unknown_name(f"class of sample {key!r}:", caption, classes.names)


@dataclass(frozen=True)
class ClassSpace:
    """The classes of a labelled data set, and the output of a classifier for each.

    Attributes:
        names: class names by label.
        folders: names that the source has for its classes, see `assign_labels`.
        columns: the classifier's output for each label; None for a class that it lacks.
        outputs: number of the classifier's outputs.

    Raises:
        UserError: for folders that are not classes.
    """

    names: tuple[str, ...]
    folders: tuple[str, ...]
    columns: tuple[int | None, ...]
    outputs: int

    def __post_init__(self) -> None:
        self.labels(self.folders)

    @classmethod
    def whole(cls, names: Sequence[str], folders: Sequence[str] = (), outputs: Sequence[str] | None = None) -> Self:
        """All classes of a classifier.

        Args:
            names: by label.
            folders: as the attribute.
            outputs: the same classes by output, matched as `assign_labels` matches folders; None if they are `names`,
                numbers if they have no names.

        Raises:
            UserError: the names of labels and outputs don't match.
        """
        columns = tuple(range(len(names)))
        if outputs is not None and tuple(names) != tuple(outputs) and not all(map(str.isdecimal, outputs)):
            columns = tuple(assign_labels(names, names, outputs, names).indices.tolist())
        return cls(tuple(names), tuple(folders), columns, len(names))

    @cached_property
    def known_labels(self) -> Tensor:
        """Labels that the classifier has, ascending, `[classes]` int64."""
        return torch.tensor([label for label, column in enumerate(self.columns) if column is not None])

    @cached_property
    def known_outputs(self) -> Tensor | None:
        """Outputs of these labels, `[classes]` int64; None if they are all outputs in order."""
        outputs = [column for column in self.columns if column is not None]
        return None if outputs == list(range(self.outputs)) else torch.tensor(outputs)

    @property
    def lacking(self) -> list[str]:
        """Names of the classes that the classifier lacks."""
        return [name for name, column in zip(self.names, self.columns, strict=True) if column is None]

    def labels(self, captions: Sequence[str], keys: Sequence[str] | None = None) -> Tensor:
        """Class indices `[n]` int64 of n captions, by `assign_labels`; `keys` (default: captions) name them in errors.

        Raises:
            UserError: a caption that is not a class.
        """
        return assign_labels(captions, keys or captions, self.names, self.folders).indices


def class_space(
    outputs: int,
    source: Source,
    classnames: Sequence[str] | None = None,
    subset: str | Path | None = None,
    trained: Sequence[str] | None = None,
) -> ClassSpace:
    """Match the classes of a source with the outputs of a classifier.

    Args:
        outputs: number of classes of the classifier.
        source: its class folders are the classes in sorted order, unless their names are numbers or in `classnames`.
            Other data is labelled by numbers from 0, or by `classnames`.
        classnames: by label.
        subset: outputs among which the classifier chooses. `in1k`: ImageNet's 1,000 classes, which classifiers of
            timm's larger ImageNet sets have by WordNet number. Otherwise a file with one output's number a line, in
            label order.
        trained: class names of the classifier by output, from its training; None if unknown.

    Raises:
        UserError: the classes of data, names and subset don't fit the classifier's.
    """
    if not outputs:
        raise UserError("the model has no classifier: its weights are not those of one")
    names, columns = _columns(outputs, subset)
    if classnames is None and subset is None:
        classnames = trained
    folders = tuple(source.classes)
    if classnames is None and names is None and folders and not all(map(str.isdecimal, folders)):
        names = folders
    names = tuple(classnames or names or map(str, range(len(columns))))
    if len(names) != len(columns):
        what = f"{len(names):,} classes are named" if classnames else f"the data has {len(names):,} class folders"
        raise UserError(
            f"the classifier has {len(columns):,} classes{' in ' + str(subset) if subset else ''}, but {what}, such as"
            f" {names[0]!r}: name all of the classifier's in its order (--classes), or the classes to choose among"
            " (--subset)"
        )
    if subset is None:
        return ClassSpace.whole(names, folders, trained)
    return ClassSpace(names, folders, columns, outputs)


def _columns(outputs: int, subset: str | Path | None) -> tuple[tuple[str, ...] | None, tuple[int | None, ...]]:
    """Names by label, if the subset has them, and the output of each label."""
    if subset is None:
        return None, tuple(range(outputs))
    if subset != IN1K:
        return None, _read_numbers(Path(subset), outputs)
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset  # seconds

    subset = infer_imagenet_subset({"num_classes": outputs})
    if subset in (None, _IN1K_NAME):
        raise UserError(
            f"--subset in1k is for classifiers of 21,841, 21,842, 21,843, 11,821 or 11,221 classes of ImageNet, got one"
            f" of {outputs:,}"
        )
    column_of = {name: column for column, name in enumerate(ImageNetInfo(subset).label_names())}
    names = ImageNetInfo(_IN1K_NAME).label_names()
    return tuple(names), tuple(map(column_of.get, names))


def _read_numbers(path: Path, outputs: int) -> tuple[int, ...]:
    lines = read_text(path, "the subset").split()
    if bad := [line for line in lines if not line.isdecimal() or int(line) >= outputs]:
        raise UserError(f"{path} holds {bad[0]!r}; expected numbers of the classifier's classes, 0..{outputs - 1}")
    numbers = tuple(map(int, lines))
    if not numbers or len(set(numbers)) < len(numbers):
        raise UserError(f"{path} holds {'a number twice' if numbers else 'no numbers'}; expected one a line, each once")
    return numbers


def load_real_labels(file: str | Path, source: Source, classes: int) -> list[frozenset[int]]:
    """Reassessed labels of ImageNet's validation set (Beyer et al. 2020, arXiv 2006.07159), by image.

    Args:
        file: JSON with a list of labels for each image, in the order of their numbers, or `imagenet` for timm's.
        source: images called `ILSVRC2012_val_00000001` and so on, from 1, one for each list.
        classes: number of classes, which bounds the labels.

    Raises:
        UserError: no such file, or its labels are not those of the source.
    """
    try:
        if file == IMAGENET:
            from timm.data.real_labels import RealLabelsImagenet

            content = RealLabelsImagenet(range(_VALIDATION_IMAGES)).real_labels.values()
        else:
            content = json.loads(read_text(Path(file), "labels"))
        labels = [frozenset(map(operator.index, each)) for each in content]
    except (TypeError, ValueError) as exc:
        raise UserError(f"{file} must be a JSON list with a list of labels for each image: {exc}") from exc
    if len(labels) != len(source):
        raise UserError(f"{file} has labels of {len(labels):,} images, but {source.description} has {len(source):,}")
    if outside := [label for each in labels for label in each if not 0 <= label < classes]:
        raise UserError(f"{file} has label {outside[0]}, but the {classes:,} classes are 0..{classes - 1}")
    for index in range(len(source)):
        if not 0 <= _validation_index(source.place(index)[1]) < len(labels):
            raise UserError(
                f"{source.name(index)} has no labels in {file}: expected images called ILSVRC2012_val_00000001 to"
                f" ILSVRC2012_val_{len(labels):08d}"
            )
    return labels


def _validation_index(key: str) -> int:
    """Index of an image in ImageNet's validation set, from 0, by its file name; -1 for another image."""
    match = _VALIDATION_NAME.search(key)
    return int(match[1]) - 1 if match else -1


@dataclass(frozen=True)
class Predictions:
    """Predictions in the order of the source, without unreadable samples.

    Attributes:
        best: [N, min(5, classes)] int64, the labels of the highest logits, best first.
        labels: [N] int64, the true labels.
        keys: the N names of the samples.
    """

    best: Tensor
    labels: Tensor
    keys: list[str]

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class RealResult:
    """Accuracies by reassessed labels. Any label of an image counts; images without labels are left out."""

    samples: int
    top1: float
    top5: float


@dataclass(frozen=True)
class ClassifyResult(Result):
    """Accuracies of a classifier.

    Attributes:
        accuracy: among the classes that the classifier has.
        lacking: classes that the classifier lacks; their images are left out.
        left_out: number of these images.
        real: by reassessed labels, if there are any.
    """

    accuracy: ZeroShotResult
    lacking: tuple[str, ...] = ()
    left_out: int = 0
    real: RealResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the accuracies at its top level."""
        content = super().to_dict()
        return {**content.pop("accuracy"), **content}


def predict(
    model: Callable[[Tensor], Tensor],
    transform: Callable[[Any], Any],
    source: Source,
    classes: ClassSpace,
    options: FeatureOptions | None = None,
) -> Predictions:
    """Best classes of all images of a source. Of equal logits the one with the lower label wins.

    Args:
        model: a module, from images to logits `[B, classes.outputs]`.
        transform: PIL image to the model's input, see `LoadedClassifier.transform`.
        source: labelled images.
        classes: of captions and logits.
        options: the cache is not used.

    Raises:
        NothingReadable: no sample could be read.
        UserError: a caption that is not a class, or the model gave NaN or infinity (the sample is named).
    """
    best, labels, keys = list[Tensor](), list[Tensor](), list[str]()

    def add(batch: EvalBatch) -> None:
        labels.append(classes.labels(batch.captions, batch.keys))
        logits = model(batch.images)
        if logits.shape[1:] != (classes.outputs,):
            raise ValueError(f"expected logits [B, {classes.outputs}], got {list(logits.shape)}")
        if classes.known_outputs is not None:
            logits = logits[:, classes.known_outputs.to(logits.device)]
        require_finite(logits, batch.keys, "image")
        order = logits.float().sort(dim=1, descending=True, stable=True).indices
        best.append(classes.known_labels[order[:, :TOP].cpu()])
        keys.extend(batch.keys)

    for_each_batch(model, add, transform, source, options or FeatureOptions())
    return Predictions(torch.cat(best), torch.cat(labels), keys)


def evaluate(
    predictions: Predictions, classes: ClassSpace, real: Sequence[frozenset[int]] | None = None
) -> ClassifyResult:
    """Top-1, top-5 and mean-per-class accuracy.

    Args:
        predictions: of all images; concatenate those of several ranks.
        classes: as for `predict`.
        real: labels by index in ImageNet's validation set, from `load_real_labels`.

    Raises:
        UserError: no image is left, or none has a reassessed label.
    """
    rows = torch.isin(predictions.labels, classes.known_labels).nonzero().flatten()
    if not len(rows):
        raise UserError("there are no images of classes that the classifier has")
    best, labels = predictions.best[rows], predictions.labels[rows]
    accuracy = summarize(_ranks(best == labels[:, None]), best[:, 0], labels, classes.names, len(classes.known_labels))
    real_result = None
    if real is not None:
        real_result = _evaluate_real(best, [real[_validation_index(predictions.keys[row])] for row in rows.tolist()])
    return ClassifyResult(accuracy, tuple(classes.lacking), len(predictions) - len(rows), real_result)


def _evaluate_real(best: Tensor, labels: Sequence[frozenset[int]]) -> RealResult:
    hits = [
        [place in accepted for place in row] for row, accepted in zip(best.tolist(), labels, strict=True) if accepted
    ]
    if not hits:
        raise UserError("no image has a reassessed label")
    ranks = _ranks(torch.tensor(hits))
    return RealResult(len(hits), hit_rate(ranks, 1), hit_rate(ranks, TOP))


def _ranks(hits: Tensor) -> Tensor:
    """First column that hits, `[N]`; TOP if none does."""
    return torch.where(hits.any(1), hits.int().argmax(1), TOP)
