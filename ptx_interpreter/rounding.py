"""Roundings between the formats of numbers, and sums that are rounded once."""

from fractions import Fraction
from typing import Any

import numpy as np

from .types import Array, Value

SMALLEST_NORMAL = np.float32(2.0**-126)
NAN16 = np.uint16(0x7FFF)
"""The NaN that conversions to 16 bits give, of bf16 and of f16."""
POISON = np.uint32(0x7FE00000)
"""The NaN that masked-off lanes of a load get, and what 16 bits of it are."""
POISON16 = np.array([0x7FE0, 0x7F00], np.uint16)
_TF32 = np.uint32(0xFFFFE000)
_LOW_BITS = np.uint64((1 << 29) - 1)
_MIDPOINT = np.uint64(1 << 28)
"""The bits of a float64 below a float32's, for a number in the middle of two float32."""


def from_bf16(bits: Value) -> Array:
    """float32 of the bits of bfloat16."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Value) -> Array:
    """The bits of bfloat16, rounded to nearest even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return _with_nan16(rounded, x)


def from_f16(bits: Value) -> Array:
    """float32 of the bits of float16."""
    return np.asarray(bits, np.uint16).view(np.float16).astype(np.float32)


def to_f16(x: Value) -> Array:
    """The bits of float16, rounded to nearest even."""
    rounded = np.asarray(x, np.float32).astype(np.float16).view(np.uint16)
    return _with_nan16(rounded, x)


def is_poison(x: Value) -> Array:
    """Which floats come from lanes that a load masked off; arithmetic keeps the bits of a NaN, but its sign."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    poison: Array = (bits & np.uint32(0x7FFFFFFF)) == POISON
    return poison


def holds_poison(bits: Array) -> Array:
    """Which unsigned integers are poison of 32 bits, or nothing but poison of 16 bits."""
    if bits.itemsize == 2:
        return np.isin(bits & np.uint16(0x7FFF), POISON16)
    return is_poison(bits.view(np.float32)) | holds_poison(bits.view(np.uint16)).reshape(*bits.shape, 2).all(-1)


def _with_nan16(rounded: Array, x: Value) -> Array:
    """`rounded` with the NaN of 16 bits where `x` is NaN."""
    nan = np.isnan(x)
    return np.where(nan, np.where(is_poison(x), POISON16[0], NAN16), rounded) if np.any(nan) else rounded


def to_tf32(x: Value) -> Array:
    """The bits of TF32, rounded to nearest, halves away from zero; the 13 that it hasn't are zero."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return np.where(np.isfinite(x), bits + np.uint32(1 << 12), bits) & _TF32


def cut_to_tf32(bits: Array) -> Array:
    """float32 of the bits of TF32: tensor cores ignore the other bits."""
    return (bits & _TF32).view(np.float32)


def nearly_equal(a: Array, b: Array) -> Array:
    """Whether bits [n, m] are of one number that was rounded in two ways: of a float, or of narrower ones side by side.

    Floats may differ by a part in 256, those of 16 bits in their last two bits.
    """
    size = a.itemsize
    near: Array = a == b
    if size == 1:
        return near
    digits, last = {2: (7, 2), 4: (23, 15), 8: (52, 44)}[size]
    infinite = ((1 << 8 * size - 1) - 1) >> digits << digits
    magnitude = a & a.dtype.type((1 << 8 * size - 1) - 1)
    is_number = (magnitude >= a.dtype.type(1 << digits)) & (magnitude < a.dtype.type(infinite))
    near |= is_number & (np.maximum(a, b) - np.minimum(a, b) < a.dtype.type(1 << last))
    if size == 2:
        return near
    halves = nearly_equal(*(np.ascontiguousarray(v).view(f"u{size // 2}") for v in (a, b)))
    return near | halves.reshape(*a.shape, 2).all(-1)


def flushed(x: Value) -> Value:
    """float32 with zeros of the same sign in place of subnormal numbers."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def saturated(x: Value) -> Value:
    """Clamped to [0, 1]; NaN becomes 0."""
    return np.fmin(np.fmax(x, x.dtype.type(0)), x.dtype.type(1)) + x.dtype.type(0)


def rounded(exact: Array, dtype: Any, mode: str) -> Array:
    """float64 to a narrower type: to nearest even (rn), to zero (rz), down (rm) or up (rp)."""
    near: Array = exact.astype(dtype)
    if mode == "rn":
        return near
    above, below = near > exact, near < exact
    if mode == "rz":
        above, below = above & (exact > 0), below & (exact < 0)
    if mode in ("rm", "rz"):
        near = np.where(above, np.nextafter(near, dtype(-np.inf)), near)
    if mode in ("rp", "rz"):
        near = np.where(below, np.nextafter(near, dtype(np.inf)), near)
    # nextafter of the least number is a zero without its sign.
    return np.where(near == 0, np.copysign(near, exact), near).astype(dtype)


def to_integer(x: Value, dtype: Any, mode: str) -> Array:
    """Float to integer: to nearest even (rni), to zero (rzi), down (rmi) or up (rpi); saturated.

    NaN becomes 0; where one of the two types has 64 bits it becomes the integer that has the highest bit alone.
    """
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x.astype(np.float64))
    info = np.iinfo(dtype)
    bits = np.iinfo(dtype).bits
    # The largest integer of 64 bits is no float64.
    low, high = whole <= float(info.min), whole >= float(info.max)
    nan = dtype(0)
    if bits == 64 or x.dtype == np.float64:
        nan = dtype(info.min if info.min else 1 << (bits - 1))
    inside = np.where(low | high | np.isnan(whole), 0.0, whole).astype(dtype)
    return np.select([np.isnan(whole), low, high], [nan, dtype(info.min), dtype(info.max)], inside)


def sum_error(a: Value, b: Value, total: Value) -> Value:
    """a + b - total, exactly, where total is the rounded sum."""
    other = total - a
    return (a - (total - other)) + (b - other)


def to_odd(total: Array, error: Value) -> Array:
    """The sum total + error rounded to the neighbour with an odd last bit, where it isn't a float64.

    A second rounding, to a format with at least two bits less, then gives the same as one rounding alone.
    """
    bits = total.view(np.int64)
    finite = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    # Away from zero where the error has the sign of the sum.
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(finite, bits + step, bits).view(np.float64)


def fma32(a: Value, b: Value, c: Value, mode: str = "rn") -> Array:
    """a * b + c of float32, rounded once. Products are exact in float64."""
    product = np.atleast_1d(np.multiply(a, b, dtype=np.float64))
    total = product + c
    return rounded(to_odd(total, sum_error(product, c, total)), np.float32, mode)


def fma_to_odd(a: Value, b: Value, c: Value) -> Array:
    """a * b + c of float32, rounded to the neighbour with an odd last bit: who rounds it to 16 bits gets what one
    rounding gives."""
    product = np.atleast_1d(np.multiply(a, b, dtype=np.float64))
    total = product + c
    exact = to_odd(total, sum_error(product, c, total))
    shorter = rounded(exact, np.float32, "rz")
    odd: Array = shorter.view(np.uint32) | (shorter != exact)
    return odd.view(np.float32)


class Underflow:
    """Notes that numpy, under `numpy_errors`, has made something subnormal that it could not keep exactly."""

    occurred = False

    @classmethod
    def note(cls, *_: object) -> None:
        cls.occurred = True


def numpy_errors() -> np.errstate:
    """The context in which instructions run."""
    return np.errstate(all="ignore", under="call", call=Underflow.note)


class Fma32:
    """a * b + c of float32 vectors of one length, rounded once, in preallocated memory: much faster than `fma32`."""

    def __init__(self, length: int) -> None:
        self._total, self._bits = np.empty(length), np.empty(length, np.uint64)
        self._flags, self._rounded = np.empty(length, bool), np.empty(length, np.float32)

    def __call__(self, a: Value, b: Value, c: Value) -> Array:
        """Valid until the next call."""
        total = np.multiply(a, b, self._total, dtype=np.float64)
        np.add(total, c, total)
        # A second rounding shows only if the first one, which isn't exact, leads to the middle of two float32.
        bits = np.bitwise_and(total.view(np.uint64), _LOW_BITS, self._bits)
        if np.count_nonzero(np.equal(bits, _MIDPOINT, self._flags)):
            self._correct(self._flags, a, b, c)
        Underflow.occurred = False
        np.copyto(self._rounded, total, casting="same_kind")
        if Underflow.occurred:  # the middles of subnormal numbers have other bits
            self._correct(np.abs(total) < SMALLEST_NORMAL, a, b, c)
            np.copyto(self._rounded, total, casting="same_kind")
        return self._rounded

    def _correct(self, suspects: Array, *sources: Value) -> None:
        at = np.flatnonzero(suspects)
        a, b, c = (source[at] if isinstance(source, np.ndarray) else source for source in sources)
        total = self._total[at]
        error = sum_error(np.multiply(a, b, dtype=np.float64), c, total)
        if np.count_nonzero(error):
            self._total[at] = to_odd(total, error)


def _split(x: Array) -> tuple[Array, Array]:
    """Two float64 of 26 bits with the sum x."""
    far = x * 134217729.0
    high = far - (far - x)
    return high, x - high


def fma64(a: Value, b: Value, c: Value) -> Array:
    """a * b + c of float64, rounded once (Boldo and Melquiond, 2008)."""
    a, b, c = (np.array(v) for v in np.broadcast_arrays(*(np.atleast_1d(v) for v in (a, b, c))))
    product = a * b
    (a1, a2), (b1, b2) = _split(a), _split(b)
    rest = a2 * b2 - (((product - a1 * b1) - a2 * b1) - a1 * b2)
    upper = c + rest
    total = product + upper
    low = sum_error(c, rest, upper)
    high = sum_error(product, upper, total)
    both = high + low
    result = np.asarray(total + to_odd(both, sum_error(high, low, both)))
    plain = (a == 0) | (b == 0) | ~np.isfinite(a) | ~np.isfinite(b) | ~np.isfinite(c)
    result = np.where(plain, product + c, result)
    near = [(np.abs(v) > 2.0**-450) & (np.abs(v) < 2.0**450) for v in (a, b, c)]
    # Parts of the product may leave the range of float64.
    for n in np.flatnonzero(~plain & ~(near[0] & near[1] & (near[2] | (c == 0)))):
        result[n] = _exact_fma(float(a[n]), float(b[n]), float(c[n]))
    return result


def _exact_fma(a: float, b: float, c: float) -> float:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    try:
        size = float(abs(exact))
    except OverflowError:
        size = float("inf")
    return -size if exact < 0 else size
