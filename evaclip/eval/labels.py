"""From the captions of a labelled source to class indices."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evaclip.errors import UserError, unknown_name


@dataclass(frozen=True)
class Labels:
    """`indices` [N] int64 into `classnames`."""

    indices: Tensor
    classnames: tuple[str, ...]


def assign_labels(
    captions: Sequence[str], keys: Sequence[str], classnames: Sequence[str] | None = None, folders: Sequence[str] = ()
) -> Labels:
    """Reads each caption as the class of its sample.

    A caption is either a whole number, the place of the class in `classnames` from 0 (as `.cls` members hold
    it), or the name of the class itself. Where no names are given, such numbers are the names; and where all names are
    numbers, but not those of their places, every number is a name: of classes 0, 2 and 5 none is called 1.

    Args:
        captions: one per sample.
        keys: the names of the samples, for the errors.
        classnames: in the order of the labels; None takes `folders`, or else the distinct captions, sorted.
        folders: the source's own names of all classes, in label order, if it has any. They may differ from
            `classnames` (as those of ImageNet do) if there are as many: the n-th folder holds the n-th class. Whole
            numbers are labels (as those of ImageNet-V2 are): folder 10 holds class 10, though it comes before 2.

    Raises:
        UserError: a caption that is no class, with the sample and the nearest names.
    """
    if classnames is None:
        classnames = folders or _distinct(captions)
    known = classnames
    if folders and not set(folders) <= set(classnames) and not all(map(str.isdecimal, folders)):
        if len(folders) != len(classnames):
            raise UserError(
                f"there are {len(classnames)} class names for {len(folders)} folders of other names"
                f" (such as {folders[0]!r}): give one name per folder, in their sorted order"
            )
        known = folders
    index_of = {name: index for index, name in enumerate(known)}
    # Two classes may have the same name, as in ImageNet; only numbers and folders tell those apart.
    unclear = sorted(name for name, count in Counter(known).items() if count > 1 and name in set(captions))
    if unclear:
        raise UserError(f"several classes are called {unclear[0]!r}: label by number or by folder")
    named = all(map(str.isdecimal, known)) and list(map(int, known)) != list(range(len(known)))
    places = 0 if named else len(known)
    indices = [_index(caption, key, index_of, places) for caption, key in zip(captions, keys, strict=True)]
    return Labels(torch.tensor(indices, dtype=torch.int64), tuple(classnames))


def _distinct(captions: Sequence[str]) -> list[str]:
    names = set(captions)
    numbers = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name) if numbers else 0, name))


def _index(caption: str, key: str, index_of: dict[str, int], places: int) -> int:
    if caption in index_of:
        return index_of[caption]
    if places and caption.isdecimal():
        if int(caption) < places:
            return int(caption)
        raise UserError(f"sample {key!r} has label {caption}, but the {places} classes are 0..{places - 1}")
    raise unknown_name(f"class of sample {key!r}:", caption, index_of)
