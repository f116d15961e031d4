"""Arithmetic of floats and integers, comparisons, selection.

Approximate instructions (ex2.approx, div.full and the like) give what numpy gives, which is within the bounds that PTX
allows and is not what a GPU gives to the bit.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import rounding
from ..body import Instruction
from ..step import NO_STEP, Active, Step, elementwise, find_modifier, makes
from ..types import DTYPES, Array, Unsupported, Value, last_type

if TYPE_CHECKING:
    from ..machine import Machine

FLOATS = ("f32", "f64")


def reciprocal(x: Value) -> Value:
    return x.dtype.type(1) / x


def smaller(a: Value, b: Value) -> Value:
    """The number if one is NaN; of zeros the negative one."""
    result = np.fmin(a, b)
    if np.count_nonzero(result == 0):
        result = np.where((result == 0) & (a == b), np.where(np.signbit(a), a, b), result)
    return _or_poison(result, a, b)


def larger(a: Value, b: Value) -> Value:
    """The number if one is NaN; of zeros the positive one."""
    result = np.fmax(a, b)
    if np.count_nonzero(result == 0):
        result = np.where((result == 0) & (a == b), np.where(np.signbit(a), b, a), result)
    return _or_poison(result, a, b)


def _or_poison(result: Value, *sources: Value) -> Value:
    """Poison where a source is: a GPU has any number in its place."""
    for source in sources:
        if np.count_nonzero(poison := rounding.is_poison(source)):
            result = np.where(poison, source, result)
    return result


def smaller_or_nan(a: Value, b: Value) -> Value:
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), smaller(a, b))


def larger_or_nan(a: Value, b: Value) -> Value:
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), larger(a, b))


def quotient(a: Value, b: Value) -> Value:
    """The quotient of integers, rounded towards zero."""
    if a.dtype.kind == "u":
        return a // b
    floor = a // b
    return floor + ((floor * b != a) & ((a < 0) != (b < 0)))


def copied_sign(sign: Value, size: Value) -> Value:
    return np.copysign(size, sign)


OF_FLOATS: dict[str, Any] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "abs": np.abs,
    "min": smaller,
    "max": larger,
    "ex2": np.exp2,
    "sqrt": np.sqrt,
    "rcp": reciprocal,
    "rsqrt": lambda x: reciprocal(np.sqrt(x)),
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "copysign": copied_sign,
}
OF_INTEGERS: dict[str, Any] = {
    "add": np.add,
    "sub": np.subtract,
    "div": quotient,
    "rem": np.fmod,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.minimum,
    "max": np.maximum,
}
OR_NAN = {"min": smaller_or_nan, "max": larger_or_nan}


HALVES = {"bf16": (rounding.from_bf16, rounding.to_bf16), "f16": (rounding.from_f16, rounding.to_f16)}


def _apply_to_half(name: str, function: Any, *sources: Value) -> Value:
    """The function of 16-bit floats, computed in float32.

    float32 has more than twice as many digits, so rounding its result again changes nothing.
    """
    widen, narrow = HALVES[name]
    return narrow(function(*map(widen, sources)))


def _apply_to_pair(name: str, function: Any, *sources: Value) -> Value:
    low = _apply_to_half(name, function, *(source & 0xFFFF for source in sources)).astype(np.uint32)
    high = _apply_to_half(name, function, *(source >> 16 for source in sources)).astype(np.uint32)
    return low | high << np.uint32(16)


def halved(machine: Machine, i: Instruction, function: Any) -> Step:
    """A function of float32 on numbers of 16 bits, or on pairs of them."""
    kind = last_type(i.mods)
    name = kind.removesuffix("x2")
    function = partial(_apply_to_half if kind == name else _apply_to_pair, name, function)
    carrier = "u16" if kind == name else "u32"
    sources = [machine.registers.source(arg, carrier) for arg in i.args[1:]]
    return elementwise(machine.registers.target(i.args[0], carrier), function, *sources)


def operation(machine: Machine, i: Instruction) -> Step:
    """An operation on floats or integers of one type."""
    kind = last_type(i.mods)
    is_half = kind.removesuffix("x2") in HALVES
    function = (OF_FLOATS if is_half or kind in FLOATS else OF_INTEGERS)[i.op]
    if "NaN" in i.mods:
        function = OR_NAN[i.op]
    if is_half:
        return halved(machine, i, function)
    sources = [machine.registers.source(arg, kind) for arg in i.args[1:]]
    if "ftz" in i.mods:
        function = partial(_flushing, function)
    if "relu" in i.mods:
        if kind != "s32":
            raise Unsupported(f"{i.op}.relu of {kind}")
        function = partial(_at_least_zero, function)
    return elementwise(machine.registers.target(i.args[0], kind), function, *sources)


HALF = "f16 bf16 f16x2 bf16x2"
makes("add sub", f"rn ftz f32 f64 {HALF} s16 s32 s64 u16 u32 u64")(operation)
makes("neg abs", f"ftz f32 f64 {HALF} s16 s32 u32 s64 u64")(operation)
makes("min max", f"relu ftz NaN f32 f64 {HALF} s16 u16 s32 u32 s64 u64")(operation)
makes("div", "rn approx full ftz f32 f64 s16 u16 s32 u32 s64 u64")(operation)
makes("rem", "s16 u16 s32 u32 s64 u64")(operation)
makes("ex2 tanh", f"approx ftz f32 {HALF}")(operation)
makes("rsqrt lg2 sin cos", "approx ftz f32 f64")(operation)
makes("sqrt", "rn approx ftz f32 f64")(operation)
makes("rcp", "rn approx ftz f32 f64")(operation)
makes("copysign", "f32 f64")(operation)


def _flushing(function: Any, *sources: Value) -> Value:
    return rounding.flushed(function(*map(rounding.flushed, sources)))


def _at_least_zero(function: Any, *sources: Value) -> Value:
    return np.maximum(function(*sources), 0)


@makes("fma", "rn rm ftz f32 f64 bf16 f16 bf16x2 f16x2")
def fused(machine: Machine, i: Instruction) -> Step:
    kind, mode = last_type(i.mods), find_modifier(i, "rn rm") or "rn"
    if kind.removesuffix("x2") in HALVES:
        if i.mods != ("rn", kind):
            raise Unsupported(f"the mode of {i.op}")
        return halved(machine, i, rounding.fma_to_odd)
    target = machine.registers.target(i.args[0], kind)
    sources = [machine.registers.source(arg, kind) for arg in i.args[1:]]
    if target is None:
        return NO_STEP
    if kind == "f64":
        if mode != "rn" or "ftz" in i.mods:
            raise Unsupported(f"the mode of {i.op}")
        return elementwise(target, rounding.fma64, *sources)
    if mode != "rn" or "ftz" in i.mods or not any(isinstance(v, np.ndarray) for v in sources[:2]):
        function: Any = partial(rounding.fma32, mode=mode)
        return elementwise(target, partial(_flushing, function) if "ftz" in i.mods else function, *sources)
    return _quick_fma(machine, target, sources)


def _quick_fma(machine: Machine, target: Array, sources: list[Value]) -> Step:
    """float32, to nearest: the most frequent instruction of all."""
    a, b, c = sources
    fma = machine.registers.fma

    def everyone() -> None:
        np.copyto(target, fma(a, b, c))

    def some(active: Active) -> None:
        np.copyto(target, fma(a, b, c), where=active.mask)

    return Step(everyone, some)


WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


@makes("mul mad", f"lo hi wide rn ftz f32 f64 {HALF} u16 s16 u32 s32 u64 s64")
def product(machine: Machine, i: Instruction) -> Step:
    """mul of floats; mul and mad of integers: the low half of the product, the high half, or the whole."""
    kind, wide = last_type(i.mods), "wide" in i.mods
    if kind.removesuffix("x2") in HALVES:
        return halved(machine, i, np.multiply)
    to = WIDE[kind] if wide else kind
    sources = [machine.registers.source(arg, kind) for arg in i.args[1:3]]
    sources += [machine.registers.source(arg, to) for arg in i.args[3:]]
    target = machine.registers.target(i.args[0], to)
    if kind in FLOATS:
        return elementwise(target, partial(_flushing, np.multiply) if "ftz" in i.mods else np.multiply, *sources)
    function: Any = np.multiply
    if wide:
        function = partial(np.multiply, dtype=DTYPES[to])
    elif "hi" in i.mods:
        function = _high_half_of_64 if kind[1:] == "64" else partial(_high_half, DTYPES[kind], DTYPES[WIDE[kind]])
    if i.op == "mul":
        return elementwise(target, function, *sources)
    return elementwise(target, lambda a, b, c: function(a, b) + c, *sources)


def _high_half(dtype: Any, wide: Any, a: Value, b: Value) -> Value:
    return (np.multiply(a, b, dtype=wide) >> wide(8 * np.dtype(dtype).itemsize)).astype(dtype)


def _high_half_of_64(a: Value, b: Value) -> Value:
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    (x1, x0), (y1, y0) = ((v >> half, v & low) for v in (x, y))
    middle = x1 * y0 + (x0 * y0 >> half)
    high = x1 * y1 + (middle >> half) + ((middle & low) + x0 * y1 >> half)
    if a.dtype.kind == "i":  # what the signs' weight adds
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.astype(a.dtype)


def _unequal(a: Value, b: Value) -> Value:
    """Whether the numbers differ and neither is NaN."""
    return (a < b) | (a > b)


COMPARISONS: dict[str, Any] = {
    "eq": np.equal,
    "ne": _unequal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    # True if a number is NaN:
    "equ": lambda a, b: ~_unequal(a, b),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}

UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@makes("setp", " ".join(COMPARISONS) + f" ftz lo ls hi hs f32 f64 {HALF} b16 u16 s16 b32 u32 s32 b64 u64 s64")
def compare(machine: Machine, i: Instruction) -> Step:
    name, kind = i.mods[0], i.mods[-1]
    name = UNSIGNED.get(name, name)
    if kind in HALVES:
        widen, _ = HALVES[kind]
        sources = [machine.registers.source(arg, "u16") for arg in i.args[1:]]
        target = machine.registers.target(i.args[0], "pred")
        return elementwise(target, lambda a, b: COMPARISONS[name](widen(a), widen(b)), *sources)
    a, b = (machine.registers.source(arg, kind) for arg in i.args[1:])
    function = np.not_equal if name == "ne" and kind not in FLOATS else COMPARISONS[name]
    return elementwise(machine.registers.target(i.args[0], "pred"), function, a, b)


@makes("selp", "b16 u16 s16 b32 u32 s32 f32 b64 u64 s64 f64")
def select(machine: Machine, i: Instruction) -> Step:
    kind = last_type(i.mods)
    a, b = (machine.registers.source(arg, kind) for arg in i.args[1:3])
    predicate = machine.registers.source(i.args[3], "pred")
    return elementwise(machine.registers.target(i.args[0], kind), np.where, predicate, a, b)
