"""CSV and TSV files that list pictures and captions."""

import csv
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from evaclip.data.table_text import Columns, Row, RowReader, text_encoding, unknown_column
from evaclip.errors import UserError

_SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "pipes"}
_USUAL = ("\t", ",")


def read_csv(path: Path, columns: Columns, separator: str | None = None) -> RowReader:
    """The rows of a CSV file; columns are found by the names of its header row.

    `separator` None takes the one of tab, comma, semicolon and pipe that gives these columns. Raises UserError, on
    reading, for a missing column and for what is no text.
    """
    if separator is not None and len(separator) != 1:
        raise UserError(f"the separator of columns must be one character, got {separator!r}")
    encoding, doubtful = text_encoding(path)
    note = f"read as {encoding}"
    if separator is None:
        separator = _guess_separator(path, encoding, columns)
        note += f", columns separated by {_SEPARATORS[separator]}"
        doubtful = doubtful or separator not in _USUAL
    return RowReader(_rows(path, encoding, separator, columns), note, doubtful)


def _guess_separator(path: Path, encoding: str, columns: Columns) -> str:
    headers = {separator: list[str]() for separator in _SEPARATORS}
    for separator in _SEPARATORS:
        # Under a wrong one a quoted field may have no end.
        with path.open(newline="", encoding=encoding) as file, suppress(csv.Error):
            headers[separator] = next(csv.reader(file, delimiter=separator), [])
    fitting = (separator for separator, header in headers.items() if set(columns) <= set(header))
    return next(fitting, max(headers, key=lambda separator: len(headers[separator])))


def _rows(path: Path, encoding: str, separator: str, columns: Columns) -> Iterator[Row]:
    with path.open(newline="", encoding=encoding) as file:
        reader = csv.reader(file, delimiter=separator)
        try:
            header = next(reader, None)
            if header is None:
                raise UserError(f"{path} is empty: a header row with the columns {' and '.join(columns)} is needed")
            if not set(columns) <= set(header):
                raise unknown_column(path, columns, header)
            image, caption = map(header.index, columns)
            for row in filter(None, reader):
                yield _cell(row, image), (_cell(row, caption),)
        except csv.Error as exc:
            raise UserError(f"{path}, line {reader.line_num}: {exc}") from exc


def _cell(row: list[str], place: int) -> str:
    return row[place] if place < len(row) else ""
