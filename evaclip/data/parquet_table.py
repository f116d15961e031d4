"""Parquet files that list pictures and captions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaclip.data.samples import texts_of
from evaclip.data.table_text import Columns, Row, RowReader, unknown_column
from evaclip.errors import UserError


def read_parquet(path: Path, columns: Columns) -> RowReader:
    """The rows of a file; a caption may be a list of them.

    Raises UserError if pyarrow is not installed and, on reading, for a file that is damaged or none, for a missing
    column and for pictures that are not given by their paths.
    """
    try:
        import pyarrow
    except ImportError as exc:
        raise UserError(f"reading {path} needs pyarrow: pip install 'evakernels[tables]'") from exc
    return RowReader(_rows(path, columns, pyarrow.ArrowException))


def _rows(path: Path, columns: Columns, failure: type[Exception]) -> Iterator[Row]:
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow, columns)
            for batch in file.iter_batches(columns=list(columns)):
                pictures, captions = (batch.column(name).to_pylist() for name in columns)
                for image, caption in zip(pictures, captions, strict=True):
                    yield image or "", texts_of(caption)
    except (failure, OSError) as exc:
        raise UserError(f"{path} cannot be read as Parquet: {exc}") from exc


def _check_columns(path: Path, schema: Any, columns: Columns) -> None:
    from pyarrow import types

    if not set(columns) <= set(schema.names):
        raise unknown_column(path, columns, schema.names)
    kind = schema.field(columns.image).type
    text = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(text) or types.is_large_string(text)):
        raise UserError(f"the column {columns.image!r} of {path} must hold paths of pictures, got {kind}")
