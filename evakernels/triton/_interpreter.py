"""Makes Triton's interpreter right for bfloat16; imported in front of the kernels under TRITON_INTERPRET=1.

The interpreter of Triton 3.6 to 3.9 keeps bfloat16 as its 16 bits: it multiplies, adds and compares them as integers,
and truncates where a GPU rounds. Here they become float32 for every calculation and are rounded to the nearest, ties to
even, where the result is bfloat16 again, as on a GPU.

It also replaces the language's functions by its own at every call of a nested function, which takes most of its time.
Here it does so once.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

Array = npt.NDArray[Any]


def widened(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: Array) -> Array:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet_nan, nearest).astype(np.uint16)


def is_bfloat16(handle: TensorHandle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def values_of(handle: TensorHandle) -> Array:
    values: Array = widened(handle.data) if is_bfloat16(handle) else handle.data
    return values


cast, convert, dot, binary = (
    getattr(InterpreterBuilder, name) for name in ("cast_impl", "create_fp_to_fp", "create_dot", "binary_op")
)


def cast_impl(self: Any, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    target = target.scalar
    if target == tl.bfloat16:
        return TensorHandle(source.data if is_bfloat16(source) else rounded(source.data), target)
    if is_bfloat16(source):
        return TensorHandle(widened(source.data).astype(interpreter._get_np_dtype(target)), target)
    return cast(self, source, target)


def create_fp_to_fp(self: Any, source: TensorHandle, target: tl.dtype, rounding: Any) -> TensorHandle:
    if tl.bfloat16 in (source.dtype.scalar, target.scalar):
        return cast_impl(self, source, target)
    return convert(self, source, target, rounding)


def create_dot(self: Any, a: TensorHandle, b: TensorHandle, to: TensorHandle, *rest: Any) -> TensorHandle:
    if is_bfloat16(a) or is_bfloat16(b):
        return TensorHandle(np.matmul(values_of(a), values_of(b), dtype=to.data.dtype) + to.data, to.dtype.scalar)
    if to.data.dtype == np.float32 and a.data.dtype == np.float32:
        # NumPy adds up a product and its transpose in different orders, a GPU in one: scores that a kernel forms again
        # the other way round are the same to the bit there, and here if they are rounded once.
        return TensorHandle((np.matmul(a.data, b.data, dtype=np.float64) + to.data).astype(np.float32), to.dtype.scalar)
    return dot(self, a, b, to, *rest)


def binary_op(self: Any, left: TensorHandle, right: TensorHandle, operation: Any) -> TensorHandle:
    if not is_bfloat16(left):
        return binary(self, left, right, operation)
    result = operation(values_of(left), values_of(right))
    return TensorHandle(result, tl.int1) if result.dtype == bool else TensorHandle(rounded(result), tl.bfloat16)


patch_lang = interpreter._patch_lang


class _Patched:
    def restore(self) -> None:
        """Leaves the language as it is, for the kernel that called."""


def patch_once(function: Any) -> Any:
    languages = [module for module in function.__globals__.values() if module is tl or module is tl.core]
    # What the interpreter puts in the place of a function of the language doesn't count as one.
    is_patched = languages and not any(tl.core.is_builtin(language.load) for language in languages)
    return _Patched() if is_patched else patch_lang(function)


interpreter._patch_lang = patch_once
InterpreterBuilder.cast_impl = cast_impl
InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
InterpreterBuilder.create_dot = create_dot
InterpreterBuilder.binary_op = binary_op
