"""Matrices in files that grow: .npy files whose rows are appended, of which the first so many count."""

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HEADER = 128
"""Bytes of each file's header, which numpy pads so that the number of rows may grow in its place."""


def write_header(path: Path, dtype: str, rows: int, columns: int) -> None:
    """Says in the file's header how many rows there are; makes the file if there is none."""
    buffer = BytesIO()
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (rows, columns)}
    np.lib.format.write_array_header_1_0(buffer, header)
    assert buffer.tell() == _HEADER
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.pwrite(descriptor, buffer.getvalue(), 0)
    finally:
        os.close(descriptor)


def write_rows(path: Path, first: int, rows: NDArray[Any]) -> None:
    """Writes rows from number `first` on, and waits until they are on the disk; the header stays as it is."""
    data = np.ascontiguousarray(rows)
    with path.open("r+b") as file:
        file.seek(_HEADER + first * data.dtype.itemsize * data.shape[1])
        file.write(data.data.cast("B"))
        file.flush()
        os.fsync(file.fileno())


def map_rows(path: Path, dtype: str, rows: int, columns: int) -> NDArray[Any]:
    """The first `rows` rows, `[rows, columns]`, read only and in memory as they are touched."""
    if rows == 0:
        return np.empty((0, columns), dtype)
    return np.memmap(path, dtype, "r", _HEADER, (rows, columns))
