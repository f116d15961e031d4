"""What a classifier's outputs stand for: classes by label, parts of larger heads, and ImageNet's reassessed labels."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from evaclip.data import Source
from evaclip.errors import UserError
from evaclip.eval.labels import assign_labels
from evaclip.eval.prompts import IMAGENET

IN1K = "in1k"
_IN1K_NAME = "imagenet-1k"
_VALIDATION_IMAGES = 50_000
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})(\.\w+)?$")


@dataclass(frozen=True)
class ClassSpace:
    """The classes that pictures are labelled with, and where the classifier has them.

    Attributes:
        names: by label.
        folders: the source's own names of its classes, see `assign_labels`.
        columns: for each label the classifier's output; None for a class that it lacks.
        outputs: how many the classifier has.

    Raises:
        UserError: for folders that are no classes.
    """

    names: tuple[str, ...]
    folders: tuple[str, ...]
    columns: tuple[int | None, ...]
    outputs: int

    def __post_init__(self) -> None:
        self.labels(self.folders)

    @classmethod
    def whole(cls, names: Sequence[str], folders: Sequence[str] = ()) -> Self:
        """All classes of a classifier that has these."""
        return cls(tuple(names), tuple(folders), tuple(range(len(names))), len(names))

    @cached_property
    def places(self) -> Tensor:
        """[classes] int64, the labels that the classifier has, in rising order."""
        return torch.tensor([label for label, column in enumerate(self.columns) if column is not None])

    @cached_property
    def chosen(self) -> Tensor | None:
        """[classes] int64, the outputs of these labels; None where they are all of them in their order."""
        chosen = [column for column in self.columns if column is not None]
        return None if chosen == list(range(self.outputs)) else torch.tensor(chosen)

    @property
    def lacking(self) -> list[str]:
        """The classes that the classifier lacks."""
        return [name for name, column in zip(self.names, self.columns, strict=True) if column is None]

    def labels(self, captions: Sequence[str], keys: Sequence[str] | None = None) -> Tensor:
        """[n] int64 of n captions, by `assign_labels`; `keys` name them in errors, without which they do themselves.

        Raises:
            UserError: a caption that is no class.
        """
        return assign_labels(captions, keys or captions, self.names, self.folders).indices


def class_space(
    outputs: int, source: Source, classnames: Sequence[str] | None = None, subset: str | Path | None = None
) -> ClassSpace:
    """What the classes of a source are in a classifier.

    Args:
        outputs: how many classes the classifier has.
        source: its class folders are the classes in sorted order, unless they are called by numbers or `classnames` has
            them; other data is labelled by numbers from 0, or by `classnames`.
        classnames: by label.
        subset: which of its classes the classifier chooses among. `in1k`: ImageNet's 1,000, which a classifier of one
            of the larger sets that timm knows has by their WordNet numbers. Or a file with the number of one output a
            line, in the order of the labels.

    Raises:
        UserError: the classes of data, names and subset don't fit the classifier's.
    """
    if not outputs:
        raise UserError("the model has no classifier: its weights are not those of one")
    names, columns = _columns(outputs, subset)
    folders = tuple(source.classes)
    if classnames is None and names is None and folders and not all(map(str.isdecimal, folders)):
        names = folders
    names = tuple(classnames or names or map(str, range(len(columns))))
    if len(names) != len(columns):
        what = f"{len(names):,} classes are named" if classnames else f"the data has {len(names):,} class folders"
        raise UserError(
            f"the classifier has {len(columns):,} classes{' in ' + str(subset) if subset else ''}, but {what}, such as"
            f" {names[0]!r}: name all of the classifier's in its order (--classes), or what it shall choose among"
            " (--subset)"
        )
    return ClassSpace(names, folders, columns, outputs)


def _columns(outputs: int, subset: str | Path | None) -> tuple[tuple[str, ...] | None, tuple[int | None, ...]]:
    """Names by label, where the subset has them, and the output of each label."""
    if subset is None:
        return None, tuple(range(outputs))
    if subset != IN1K:
        return None, _read_numbers(Path(subset), outputs)
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset  # seconds

    known = infer_imagenet_subset({"num_classes": outputs})
    if known in (None, _IN1K_NAME):
        raise UserError(
            f"--subset in1k is for classifiers of 21,841, 21,842, 21,843, 11,821 or 11,221 classes of ImageNet, got one"
            f" of {outputs:,}"
        )
    column_of = {name: column for column, name in enumerate(ImageNetInfo(known).label_names())}
    names = ImageNetInfo(_IN1K_NAME).label_names()
    return tuple(names), tuple(map(column_of.get, names))


def _read_numbers(path: Path, outputs: int) -> tuple[int, ...]:
    lines = _read(path, "the subset").split()
    if bad := [line for line in lines if not line.isdecimal() or int(line) >= outputs]:
        raise UserError(f"{path} holds {bad[0]!r}; expected numbers of the classifier's classes, 0..{outputs - 1}")
    numbers = tuple(map(int, lines))
    if not numbers or len(set(numbers)) < len(numbers):
        raise UserError(f"{path} holds {'a number twice' if numbers else 'no numbers'}; expected one a line, each once")
    return numbers


def load_real_labels(given: str | Path, source: Source, classes: int) -> list[frozenset[int]]:
    """The reassessed labels of ImageNet's validation set (Beyer et al. 2020, arXiv 2006.07159), by picture.

    Args:
        given: a JSON file with a list of labels for each picture, in the order of their numbers, or `imagenet` for the
            one that timm carries.
        source: pictures called `ILSVRC2012_val_00000001` and so on, from 1, one for each list.
        classes: that labels may stand for.

    Raises:
        UserError: no such file, or its labels are not those of the source.
    """
    try:
        labels = [frozenset(map(_whole, each)) for each in _listed(given)]
    except (TypeError, ValueError) as exc:
        raise UserError(f"{given}: expected a JSON list with a list of labels for each picture ({exc})") from exc
    if len(labels) != len(source):
        raise UserError(f"{given} has labels of {len(labels):,} pictures, but {source.description} has {len(source):,}")
    if outside := [label for each in labels for label in each if not 0 <= label < classes]:
        raise UserError(f"{given} has label {outside[0]}, but the {classes:,} classes are 0..{classes - 1}")
    for index in range(len(source)):
        number = validation_number(source.place(index)[1])
        if not 0 <= number < len(labels):
            raise UserError(
                f"{source.name(index)} has no labels in {given}: expected pictures called ILSVRC2012_val_00000001 to"
                f" ILSVRC2012_val_{len(labels):08d}"
            )
    return labels


def validation_number(key: str) -> int:
    """The place of a picture in ImageNet's validation set, from 0, by its file's name; -1 for another picture."""
    found = _VALIDATION_NAME.search(key)
    return int(found[1]) - 1 if found else -1


def _listed(given: str | Path) -> Any:
    if given != IMAGENET:
        return json.loads(_read(Path(given), "labels"))
    from timm.data.real_labels import RealLabelsImagenet

    return RealLabelsImagenet(range(_VALIDATION_IMAGES)).real_labels.values()


def _whole(label: object) -> int:
    if not isinstance(label, int) or isinstance(label, bool):
        raise ValueError(f"{label!r} is no label")
    return label


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read {what} from {str(path)!r}: {reason}") from exc
