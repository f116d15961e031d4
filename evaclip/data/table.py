"""Tables that list pictures and captions, whatever their format."""

import logging
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evaclip.data.csv_table import read_csv
from evaclip.data.jsonl_table import read_jsonl
from evaclip.data.kinds import Kind
from evaclip.data.order import I64
from evaclip.data.packed_strings import StringPacker
from evaclip.data.parquet_table import read_parquet
from evaclip.data.samples import BadSample, FaultKind, RawSample, not_blank, read_image_file
from evaclip.data.source import Source, hash_list
from evaclip.data.table_text import Columns, RowReader
from evaclip.errors import UserError

_LOG = logging.getLogger("evaclip.data")

COLUMNS = Columns("filepath", "title")
TABLES: dict[str, Kind] = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
"""The kind of a table by its suffix."""


class TableSource(Source):
    """One sample per row; picture paths are relative to the table's folder.

    Args:
        path: a CSV, JSON Lines or Parquet file.
        kind: which of them: csv, jsonl or parquet.
        columns: the columns of the pictures and of the captions. Those may be lists in JSON Lines and Parquet.
        separator: of a CSV file; None guesses it.

    Raises:
        UserError: a column is missing, the file can't be read as what it is said to be, or it has no row.
    """

    def __init__(self, path: Path, kind: str, columns: Columns = COLUMNS, separator: str | None = None) -> None:
        self.description = str(path)
        self._folder = path.parent
        images, captions, ends = StringPacker(), StringPacker(), array("q")
        try:
            reader = _read(path, kind, columns, separator)
            for image, texts in reader.rows:
                images.add(image)
                for text in texts:
                    captions.add(text)
                ends.append(len(captions))
        except UnicodeDecodeError as exc:
            raise UserError(f"{path} is no {exc.encoding} text: {exc}") from exc
        except OSError as exc:
            raise UserError(f"cannot read {path}: {exc.strerror}") from exc
        self._images, self._captions = images.packed(), captions.packed()
        self._ends = np.array(ends, np.int64)
        if not len(self._images):
            raise UserError(f"there are 0 rows {'below the header of' if kind == 'csv' else 'in'} {path}")
        self.shard_sizes = [len(self._images)]
        by_row = map(self._texts, range(len(self._images)))
        self.fingerprint = hash_list(kind, zip(self._images, by_row, strict=True))
        self.notes = [reader.note] if reader.note else []
        for note in self.notes:
            _LOG.log(logging.WARNING if reader.doubtful else logging.INFO, "%s: %s", path, note)

    def __getitem__(self, index: int) -> RawSample:
        image, captions = self._images[index], not_blank(self._texts(index))
        if not image:
            raise BadSample(FaultKind.MISSING_IMAGE, self.name(index), "the row names no picture")
        if not captions and self.wants_captions:
            raise BadSample(FaultKind.MISSING_CAPTION, self.name(index))
        return RawSample(image, read_image_file(self._folder / image), captions)

    def pictures(self) -> I64:
        # Two paths with one checksum are taken for one picture, which does no harm.
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


def _read(path: Path, kind: str, columns: Columns, separator: str | None) -> RowReader:
    if path.is_dir():
        raise UserError(f"{path} is a folder; a {kind} file is expected")
    if kind == "parquet":
        return read_parquet(path, columns)
    return read_csv(path, columns, separator) if kind == "csv" else read_jsonl(path, columns)
