"""mov and cvt: the same bits elsewhere, the same number in another format."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import rounding
from ..body import Instruction
from ..step import Step, elementwise, find_modifier, makes, several
from ..types import DTYPES, SIZES, Unsupported, Value, last_type, unsigned

if TYPE_CHECKING:
    from ..machine import Machine

FLOATS = ("f16", "f32", "f64", "bf16")
TO_16_BITS = {"bf16": rounding.to_bf16, "f16": rounding.to_f16}


def same(x: Value) -> Value:
    return x


@makes("mov", "pred b16 u16 s16 b32 u32 s32 f32 b64 u64 s64 f64")
def move(machine: Machine, i: Instruction) -> Step:
    kind = last_type(i.mods)
    if isinstance(i.args[1], list):
        return _join(machine, i.args[0], i.args[1], SIZES[kind])
    if isinstance(i.args[0], list):
        return _divide(machine, i.args[0], i.args[1], SIZES[kind])
    source = machine.registers.source(i.args[1], kind)
    function = np.positive if isinstance(source, np.ndarray) and kind != "pred" else same
    return elementwise(machine.registers.target(i.args[0], kind), function, source)


def _join(machine: Machine, name: Any, parts: list[str], size: int) -> Step:
    """The first part becomes the lowest bits."""
    each = size // len(parts)
    whole = DTYPES[unsigned(size)]
    sources = [machine.registers.source(part, unsigned(each)) for part in parts]

    def joined(*values: Value) -> Value:
        bits = whole(0)
        for n, value in enumerate(values):
            bits = bits | value.astype(whole) << whole(8 * each * n)
        return bits

    return elementwise(machine.registers.target(name, unsigned(size)), joined, *sources)


def _divide(machine: Machine, names: list[str], whole: Any, size: int) -> Step:
    kind = unsigned(size // len(names))
    source = machine.registers.source(whole, unsigned(size))
    steps = []
    for n, name in enumerate(names):
        shift = DTYPES[unsigned(size)](8 * SIZES[kind] * n)
        part = partial(_part, shift, DTYPES[kind])
        steps.append(elementwise(machine.registers.target(name, kind), part, source))
    return several(steps)


def _part(shift: Any, dtype: Any, whole: Value) -> Value:
    return (whole >> shift).astype(dtype)


@makes("cvta", "to global u64")
def to_address(machine: Machine, i: Instruction) -> Step:
    """Generic addresses of global memory are its own; no kernel takes those of shared memory."""
    source = machine.registers.source(i.args[1], "u64")
    return elementwise(machine.registers.target(i.args[0], "u64"), np.positive, source)


MODES = "rn rz rm rp rni rzi rmi rpi"
TYPES = "u8 s8 u16 s16 u32 s32 u64 s64 f16 f32 f64 bf16 bf16x2 f16x2"


@makes("cvt", f"{MODES} rna sat tf32 {TYPES}")
def convert(machine: Machine, i: Instruction) -> Step:
    if "tf32" in i.mods:
        if i.mods != ("rna", "tf32", "f32"):
            raise Unsupported("a conversion to TF32 but .rna.tf32.f32")
        target, source = machine.registers.target(i.args[0], "b32"), machine.registers.source(i.args[1], "f32")
        return elementwise(target, rounding.to_tf32, source)
    to, kind = (mod for mod in i.mods if mod in DTYPES)
    sources = [machine.registers.source(arg, kind) for arg in i.args[1:]]
    if to.endswith("x2"):
        pair = partial(_pair, TO_16_BITS[to.removesuffix("x2")])
        return elementwise(machine.registers.target(i.args[0], "b32"), pair, *sources)
    bits = "b16" if to == "f16" else to  # numpy has another NaN
    return elementwise(machine.registers.target(i.args[0], bits), _conversion(i, to, kind), *sources)


def _pair(narrow: Any, high: Value, low: Value) -> Value:
    return narrow(high).astype(np.uint32) << np.uint32(16) | narrow(low)


def _conversion(i: Instruction, to: str, kind: str) -> Any:
    mode, dtype = find_modifier(i, MODES), DTYPES[to]
    if "sat" in i.mods and not (to == kind == "f32"):
        raise Unsupported("the modifier .sat of these types")
    if to in FLOATS:
        return _to_float(to, kind, mode, "sat" in i.mods)
    if kind in FLOATS:
        if mode not in ("rni", "rzi", "rmi", "rpi") or kind == "bf16":
            raise Unsupported(f"the rounding .{mode} to an integer")
        return lambda x: rounding.to_integer(x, dtype, mode)
    return lambda x: x.astype(dtype)


def _to_float(to: str, kind: str, mode: str | None, saturate: bool) -> Any:
    if mode not in (None, "rn", "rz", "rm", "rp"):
        raise Unsupported(f"the rounding .{mode} to a float")
    if saturate:
        return rounding.saturated
    if kind == "bf16" and to == "f32":
        return rounding.from_bf16
    if to in TO_16_BITS and kind == "f32" and mode == "rn":
        return TO_16_BITS[to]
    dtype = DTYPES[to]
    if mode in ("rz", "rm", "rp") and (kind, to) == ("f64", "f32"):
        return lambda x: rounding.rounded(x, dtype, mode)
    if mode not in (None, "rn") or "bf16" in (to, kind) or to == "f16":
        raise Unsupported(f"the conversion of {kind} to {to} with .{mode}")
    return lambda x: x.astype(dtype)  # integers of 64 bits too are rounded to nearest even
