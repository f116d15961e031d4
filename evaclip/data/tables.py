"""Tables of image paths and captions: CSV, JSON Lines and Parquet."""

import codecs
import csv
import json
import logging
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from evaclip.data import Kind
from evaclip.data.order import I64
from evaclip.data.packed_strings import StringPacker
from evaclip.data.samples import BadSample, FaultKind, RawSample, not_blank, read_image_file, sound, texts_of
from evaclip.data.source import Source, hash_list
from evaclip.errors import UserError

_LOG = logging.getLogger("evaclip.data")
_SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "pipes"}

Rows = Iterator[tuple[str, Sequence[str]]]
"""The path of an image, "" if there is none, and its captions."""


Columns = tuple[str, str]
"""Names of the columns of images and captions."""

TABLES: dict[str, Kind] = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
"""The kind of a table by its suffix."""


class TableSource(Source):
    """One sample per row; image paths are relative to the table's folder.

    Args:
        path: a CSV, JSON Lines or Parquet file.
        kind: its format: csv, jsonl or parquet.
        image_key: the column of image paths; None for filepath.
        caption_key: the column of captions; None for title. A caption may be a list in JSON Lines and Parquet.
        separator: of a CSV file; None for tab, comma, semicolon or pipe, the one that gives the columns.

    Raises:
        UserError: a column is missing, the file isn't of this format, or it has no row.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        image_key: str | None = None,
        caption_key: str | None = None,
        separator: str | None = None,
    ) -> None:
        self.description = str(path)
        self._folder = path.parent
        if path.is_dir():
            raise UserError(f"{path} is a folder; a {kind} file is expected")
        images, captions, ends = StringPacker(), StringPacker(), array("q")
        columns = (image_key or "filepath", caption_key or "title")
        try:
            for image, texts in self._read(path, kind, columns, separator):
                images.add(image)
                for text in texts:
                    captions.add(text)
                ends.append(len(captions))
        except UnicodeDecodeError as exc:
            raise UserError(f"{path} is not {exc.encoding} text: {exc}") from exc
        except OSError as exc:
            raise UserError(f"cannot read {path}: {exc.strerror}") from exc
        self._images, self._captions = images.packed(), captions.packed()
        self._ends = np.array(ends, np.int64)
        if not len(self._images):
            raise UserError(f"there are 0 rows {'below the header of' if kind == 'csv' else 'in'} {path}")
        self.shard_sizes = [len(self._images)]
        by_row = map(self._texts, range(len(self._images)))
        self.fingerprint = hash_list(kind, zip(self._images, by_row, strict=True))

    def _read(self, path: Path, kind: str, columns: Columns, separator: str | None) -> Rows:
        """Return the rows, and set `notes` to what was guessed about a text file."""
        if kind == "parquet":
            return _parquet_rows(path, columns)
        if separator is not None and len(separator) != 1:
            raise UserError(f"the separator of columns must be one character, got {separator!r}")
        encoding = _text_encoding(path)
        note, doubtful = f"read as {encoding}", encoding == "cp1252"
        if kind == "csv" and separator is None:
            separator = _guess_separator(path, encoding, columns)
            note += f", columns separated by {_SEPARATORS[separator]}"
            doubtful = doubtful or separator not in "\t,"
        self.notes = [note]
        _LOG.log(logging.WARNING if doubtful else logging.INFO, "%s: %s", path, note)
        if kind == "csv":
            return _csv_rows(path, encoding, separator or ",", columns)
        return _jsonl_rows(path, encoding, columns)

    def __getitem__(self, index: int) -> RawSample:
        image, captions = self._images[index], self.captions(index)
        if not image:
            raise BadSample(FaultKind.MISSING_IMAGE, self.name(index), "the row names no image")
        if not captions and self.wants_captions:
            raise BadSample(FaultKind.MISSING_CAPTION, self.name(index))
        return RawSample(image, read_image_file(self._folder / image), captions)

    def captions(self, index: int) -> tuple[str, ...]:
        return not_blank(self._texts(index))

    def pictures(self) -> I64:
        # Two paths with one checksum count as one image, which is harmless.
        checksums = (zlib.crc32(image.encode("utf-8", "surrogateescape")) for image in self._images)
        return np.fromiter(checksums, np.int64, len(self._images))

    def name(self, index: int) -> str:
        return f"{self.description}:row {index + 1}:{self._images[index]}"

    def file(self, index: int) -> Path:
        return self._folder / self._images[index]

    def place(self, index: int) -> tuple[str, str]:
        return self.description, self._images[index]

    def _texts(self, index: int) -> Sequence[str]:
        return self._captions[int(self._ends[index - 1]) if index else 0 : int(self._ends[index])]


def _unknown_column(path: Path, columns: Columns, names: Iterable[str]) -> UserError:
    return UserError(
        f"{path} must have the columns {columns[0]!r} (images) and {columns[1]!r} (captions), got"
        f" {', '.join(map(repr, names))}; data.image_key and data.caption_key choose others, or on the command line"
        " --csv-img-key and --csv-caption-key (train), --image-key and --caption-key (data, eval, index)"
    )


def _text_encoding(path: Path) -> str:
    """Return the encoding that decodes the whole file: UTF-8, UTF-16 with a byte order mark, or else cp1252."""
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
    for encoding in ("utf-8-sig", "cp1252"):
        with suppress(UnicodeDecodeError), path.open(encoding=encoding, newline="") as text:
            while text.read(2**20):
                pass
            return encoding
    raise UserError(f"{path} is not text: neither UTF-8, UTF-16 with a byte order mark nor cp1252")


def _guess_separator(path: Path, encoding: str, columns: Columns) -> str:
    headers = {separator: list[str]() for separator in _SEPARATORS}
    for separator in _SEPARATORS:
        # With a wrong separator, a quoted field may have no end.
        with path.open(newline="", encoding=encoding) as file, suppress(csv.Error):
            headers[separator] = next(csv.reader(file, delimiter=separator), [])
    fitting = (separator for separator, header in headers.items() if set(columns) <= set(header))
    return next(fitting, max(headers, key=lambda separator: len(headers[separator])))


def _csv_rows(path: Path, encoding: str, separator: str, columns: Columns) -> Rows:
    with path.open(newline="", encoding=encoding) as file:
        reader = csv.reader(file, delimiter=separator)
        try:
            header = next(reader, None)
            if header is None:
                raise UserError(f"{path} is empty: a header row with the columns {' and '.join(columns)} is needed")
            if not set(columns) <= set(header):
                raise _unknown_column(path, columns, header)
            places = [header.index(column) for column in columns]
            for row in filter(None, reader):
                image, caption = (row[place] if place < len(row) else "" for place in places)
                yield image, (caption,)
        except csv.Error as exc:
            raise UserError(f"{path}, line {reader.line_num}: {exc}") from exc


def _jsonl_rows(path: Path, encoding: str, columns: Columns) -> Rows:
    first: dict[str, Any] = {}
    missing = set(columns)
    with path.open(encoding=encoding) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as exc:
                where = f"{path}, line {number}"
                raise UserError(f"{where}: not valid JSON ({exc.msg}, at character {exc.pos + 1})") from exc
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: a JSON object is expected, got {line.strip()[:40]!r}")
            first = first or row
            missing -= row.keys()
            image, caption = map(row.get, columns)
            yield sound(image) if isinstance(image, str) else "", texts_of(caption)
    if first and missing:
        raise _unknown_column(path, columns, first)


def _parquet_rows(path: Path, columns: Columns) -> Rows:
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError as exc:
        raise UserError(f"reading {path} needs pyarrow: pip install 'evakernels[tables]'") from exc
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if not set(columns) <= set(schema.names):
                raise _unknown_column(path, columns, schema.names)
            kind = schema.field(columns[0]).type
            text = kind.value_type if types.is_dictionary(kind) else kind
            if not (types.is_string(text) or types.is_large_string(text)):
                raise UserError(f"the column {columns[0]!r} of {path} must hold paths of images, got {kind}")
            for batch in file.iter_batches(columns=list(columns)):
                images, captions = (batch.column(name).to_pylist() for name in columns)
                for image, caption in zip(images, captions, strict=True):
                    yield image or "", texts_of(caption)
    except (ArrowException, OSError) as exc:
        raise UserError(f"{path} cannot be read as Parquet: {exc}") from exc
