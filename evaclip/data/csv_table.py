"""CSV and TSV files that list pictures and captions."""

import csv
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evaclip.data.order import I64
from evaclip.data.packed_strings import PackedStrings
from evaclip.data.samples import BadSample, FaultKind, RawSample
from evaclip.data.source import Source, hash_list
from evaclip.errors import UserError, unknown_name

IMAGE_KEY = "filepath"
CAPTION_KEY = "title"


class CsvSource(Source):
    """One sample per row; picture paths are relative to the table's folder.

    Columns are found by the names of the header row. `separator` None takes the tab if the header has one,
    else the comma. Raises UserError for a missing column, text that is not UTF-8, or a table without rows.
    """

    def __init__(
        self,
        path: Path,
        image_key: str = IMAGE_KEY,
        caption_key: str = CAPTION_KEY,
        separator: str | None = None,
    ) -> None:
        self.description = str(path)
        self._folder = path.parent
        try:
            separator = separator or _guess_separator(path)
            self._images = PackedStrings.pack(row[0] for row in _read_rows(path, separator, (image_key, caption_key)))
            self._captions = PackedStrings.pack(row[1] for row in _read_rows(path, separator, (image_key, caption_key)))
        except UnicodeDecodeError as exc:
            raise UserError(f"{path} is not UTF-8 text: {exc}") from exc
        if not len(self._images):
            raise UserError(f"there are 0 rows below the header of {path}")
        self.shard_sizes = [len(self._images)]
        self.fingerprint = hash_list("csv", zip(self._images, self._captions, strict=True))

    def __getitem__(self, index: int) -> RawSample:
        image, caption = self._images[index], self._captions[index].strip()
        if not image:
            raise BadSample(FaultKind.MISSING_IMAGE, self.name(index), "the row names no picture")
        if not caption:
            raise BadSample(FaultKind.MISSING_CAPTION, self.name(index))
        return RawSample(image, read_image_file(self._folder / image), (caption,))

    def pictures(self) -> I64:
        # Two paths with one checksum are taken for one picture, which does no harm.
        checksums = (zlib.crc32(image.encode("utf-8", "surrogateescape")) for image in self._images)
        return np.fromiter(checksums, np.int64, len(self._images))

    def name(self, index: int) -> str:
        return f"{self.description}:row {index + 1}:{self._images[index]}"


def read_image_file(path: Path) -> bytes:
    """The bytes of a picture. Raises BadSample if it is missing, empty or unreadable."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as exc:
        raise BadSample(FaultKind.MISSING_IMAGE, str(path), "no such file") from exc
    except (OSError, ValueError) as exc:
        raise BadSample(FaultKind.UNREADABLE, str(path), str(exc)) from exc
    if not data:
        raise BadSample(FaultKind.MISSING_IMAGE, str(path), "the file has 0 bytes")
    return data


def _guess_separator(path: Path) -> str:
    with path.open(encoding="utf-8-sig") as file:
        return "\t" if "\t" in file.readline() else ","


def _read_rows(path: Path, separator: str, columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=separator)
        try:
            header = next(reader, None)
            if header is None:
                raise UserError(f"{path} is empty: a header row with the columns {' and '.join(columns)} is needed")
            places = [_column(path, header, name) for name in columns]
            for row in filter(None, reader):
                yield tuple(row[place] if place < len(row) else "" for place in places)
        except csv.Error as exc:
            raise UserError(f"{path}, line {reader.line_num}: {exc}") from exc


def _column(path: Path, header: list[str], name: str) -> int:
    if name not in header:
        raise unknown_name(f"column of {path}", name, header)
    return header.index(name)
