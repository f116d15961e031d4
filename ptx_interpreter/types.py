"""The types of PTX, and the numpy types that carry them."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
"""An array of one value per lane, unless noted otherwise."""
Value = Any
"""An operand: an `Array`, or one numpy number for all lanes."""

WARP = 32

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


def last_type(modifiers: Iterable[str]) -> str:
    """The last modifier that names a type."""
    kinds = [mod for mod in modifiers if mod in DTYPES]
    if not kinds:
        raise Unsupported("an instruction without a type")
    return kinds[-1]


def unsigned(size: int) -> str:
    """The type of bits of this size in bytes."""
    return f"u{8 * size}"
