"""JSON Lines that list pictures and captions: one object a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaclip.data.samples import sound, texts_of
from evaclip.data.table_text import Columns, Row, RowReader, text_encoding, unknown_column
from evaclip.errors import UserError


def read_jsonl(path: Path, columns: Columns) -> RowReader:
    """The objects of a file; a caption may be a list of them.

    Raises UserError, on reading, for a line that is no object, and for a column that no object has.
    """
    encoding, doubtful = text_encoding(path)
    return RowReader(_rows(path, encoding, columns), f"read as {encoding}", doubtful)


def _rows(path: Path, encoding: str, columns: Columns) -> Iterator[Row]:
    first: dict[str, Any] = {}
    missing = set(columns)
    with path.open(encoding=encoding) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = _parse(path, number, line)
            first = first or row
            missing -= row.keys()
            image = row.get(columns.image)
            yield sound(image) if isinstance(image, str) else "", texts_of(row.get(columns.caption))
    if first and missing:
        raise unknown_column(path, columns, first)


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as exc:
        raise UserError(f"{path}, line {number}: not valid JSON ({exc.msg}, at character {exc.pos + 1})") from exc
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {number}: a JSON object is expected, got {line.strip()[:40]!r}")
    return row
