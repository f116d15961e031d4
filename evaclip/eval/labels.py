"""From the captions of a labelled source to class indices."""

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


def assign_labels(captions: Sequence[str], keys: Sequence[str], classnames: Sequence[str] | None = None) -> Labels:
    """Reads each caption as the class of its sample.

    A caption is either a whole number, the place of the class in `classnames` from 0 (as `.cls` members hold it), or the
    name of the class itself. Captions may all be numbers although no names are given; the numbers then are the names.

    Args:
        captions: one per sample.
        keys: the names of the samples, for the errors.
        classnames: in the order of the labels; None takes the distinct captions, sorted.

    Raises:
        UserError: a caption that is no class, with the sample and the nearest names.
    """
    if classnames is None:
        distinct = set(captions)
        numbers = all(caption.isdecimal() for caption in distinct)
        classnames = sorted(distinct, key=lambda name: (int(name) if numbers else 0, name))
    index_of = {name: index for index, name in enumerate(classnames)}
    indices = [_index(caption, key, index_of) for caption, key in zip(captions, keys, strict=True)]
    return Labels(torch.tensor(indices, dtype=torch.int64), tuple(classnames))


def _index(caption: str, key: str, index_of: dict[str, int]) -> int:
    if caption in index_of:
        return index_of[caption]
    if caption.isdecimal():
        if int(caption) < len(index_of):
            return int(caption)
        raise UserError(f"sample {key!r} has label {caption}, but there are {len(index_of)} classes (0..{len(index_of) - 1})")
    raise unknown_name(f"class of sample {key!r}:", caption, index_of)
