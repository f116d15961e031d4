"""The types of PTX, and the numpy types that carry them."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
"""Of one value per lane, unless said otherwise."""
Value = Any
"""What an operand is: an `Array`, or one numpy number that holds for all lanes."""

WARP = 32
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that a block may have, by compute capability times ten (CUDA C++ Programming Guide)."""

DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    **dict.fromkeys(("b8", "u8"), np.uint8),
    **dict.fromkeys(("b16", "u16", "bf16"), np.uint16),
    **dict.fromkeys(("b32", "u32", "f16x2", "bf16x2"), np.uint32),
    **dict.fromkeys(("b64", "u64"), np.uint64),
    "s8": np.int8,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
}
TYPES = {name: np.dtype(dtype) for name, dtype in DTYPES.items()}
SIZES = {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()}

CARRIERS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
"""numpy types that move words of so many bytes unchanged; numpy has no wider one."""
SHIFTS = {size: size.bit_length() - 1 for size in CARRIERS}


class Unsupported(NotImplementedError):
    """PTX that the interpreter doesn't know; the message names it, and where it stands."""


def type_of(modifiers: Iterable[str]) -> str:
    """The last modifier that names a type."""
    found = [mod for mod in modifiers if mod in DTYPES]
    if not found:
        raise Unsupported("an instruction without a type")
    return found[-1]


def unsigned(size: int) -> str:
    """The type of bits of this size in bytes."""
    return f"u{8 * size}"
