"""What the readers of tables share: columns, rows, and the encoding of text."""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evaclip.errors import UserError

Row = tuple[str, Sequence[str]]
"""The path of a picture, "" where there is none, and its captions, as they stand in the table."""


class Columns(NamedTuple):
    """The names of the two columns that are read."""

    image: str
    caption: str


def unknown_column(path: Path, columns: Columns, given: Iterable[str]) -> UserError:
    """The error for a table that lacks one of the two columns."""
    return UserError(
        f"{path} must have the columns {columns.image!r} (images) and {columns.caption!r} (captions), got"
        f" {', '.join(map(repr, given))}; data.image_key and data.caption_key choose others, or on the command line"
        " --csv-img-key and --csv-caption-key (train), --image-key and --caption-key (data, eval, index)"
    )


@dataclass(frozen=True)
class RowReader:
    """A table that is being read.

    Attributes:
        rows: in order, once.
        note: what was guessed of the file.
        doubtful: whether it is so unusual that it may be wrong.
    """

    rows: Iterator[Row]
    note: str = ""
    doubtful: bool = False


def text_encoding(path: Path) -> tuple[str, bool]:
    """The encoding that a whole text file can be read in, and whether it is the last resort: cp1252.

    The others are UTF-8, with or without a byte order mark, and UTF-16 with one. Raises UserError if it is none.
    """
    with path.open("rb") as file:
        mark = file.read(2)
    if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16", False
    for encoding, last in (("utf-8-sig", False), ("cp1252", True)):
        if _decodes(path, encoding):
            return encoding, last
    raise UserError(f"{path} is no text: neither UTF-8, UTF-16 with a byte order mark nor cp1252")


def _decodes(path: Path, encoding: str) -> bool:
    try:
        with path.open(encoding=encoding, newline="") as file:
            while file.read(2**20):
                pass
    except UnicodeDecodeError:
        return False
    return True
