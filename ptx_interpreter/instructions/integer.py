"""Bits: logic, shifts, fields."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..body import Instruction
from ..step import Step, elementwise
from ..types import DTYPES, SIZES, Value, type_of, unsigned
from .registry import makes

if TYPE_CHECKING:
    from ..machine import Machine

LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@makes("and or xor not", "pred b16 b32 b64")
def logic(machine: Machine, i: Instruction) -> Step:
    kind = type_of(i.mods)
    sources = [machine.registers.source(arg, kind) for arg in i.args[1:]]
    return elementwise(machine.registers.target(i.args[0], kind), LOGIC[i.op], *sources)


@makes("shl shr", "b16 b32 b64 u16 u32 u64 s16 s32 s64")
def shift(machine: Machine, i: Instruction) -> Step:
    """By amounts that are clamped to the width: what is shifted in there is zero, or the sign."""
    kind = type_of(i.mods)
    dtype = DTYPES[kind]
    value = machine.registers.source(i.args[1], kind)
    amount = machine.registers.source(i.args[2], "u32")
    target = machine.registers.target(i.args[0], kind)
    shifted = np.left_shift if i.op == "shl" else np.right_shift
    if not isinstance(amount, np.ndarray) and amount < 8 * SIZES[kind]:
        return elementwise(target, shifted, value, dtype(amount))
    return elementwise(target, partial(_shift, shifted, dtype), value, amount)


def _shift(shifted: Any, dtype: Any, value: Value, amount: Value) -> Value:
    """numpy too shifts zeros or signs in."""
    return shifted(value, np.minimum(amount, 8 * np.dtype(dtype).itemsize).astype(dtype))


@makes("bfe", "u32 s32")
def field(machine: Machine, i: Instruction) -> Step:
    """`length` bits from `start` on, extended by zeros or by the field's sign."""
    kind = type_of(i.mods)
    value = machine.registers.source(i.args[1], kind)
    start, length = (machine.registers.source(arg, "u32") for arg in i.args[2:])
    return elementwise(machine.registers.target(i.args[0], kind), _field, value, start, length)


def _field(value: Value, start: Value, length: Value) -> Value:
    # In 64 bits what lies above the value are copies of its sign, or zeros: what PTX wants there too.
    wide = value.astype(np.int64)
    start, length = (np.minimum(v & np.uint32(0xFF), 32).astype(np.int64) for v in (start, length))
    unused = 64 - length
    if value.dtype.kind == "i":
        return np.where(length == 0, 0, (wide >> start) << (unused & 63) >> (unused & 63))
    return (wide >> start) & ((np.int64(1) << length) - 1)


@makes("bfi", "b32 b64")
def insert(machine: Machine, i: Instruction) -> Step:
    """The low `length` bits of the first value in place of those of the second one from `start` on."""
    kind = type_of(i.mods)
    value, into = (machine.registers.source(arg, kind) for arg in i.args[1:3])
    start, length = (machine.registers.source(arg, "u32") for arg in i.args[3:])
    return elementwise(machine.registers.target(i.args[0], kind), _insert, value, into, start, length)


def _insert(value: Value, into: Value, start: Value, length: Value) -> Value:
    # numpy shifts zeros in, however far.
    start, length = (np.minimum(v & np.uint32(0xFF), 64).astype(np.uint64) for v in (start, length))
    mask = ~(~np.uint64(0) << length) << start
    return (into & ~mask | value.astype(np.uint64) << start & mask).astype(into.dtype)


@makes("popc clz brev", "b32 b64")
def bits(machine: Machine, i: Instruction) -> Step:
    """How many bits are set, how many zeros come first, or the bits in reverse order."""
    kind = type_of(i.mods)
    source = machine.registers.source(i.args[1], unsigned(SIZES[kind]))
    target = machine.registers.target(i.args[0], kind if i.op == "brev" else "u32")
    return elementwise(target, partial(BITS[i.op], 8 * SIZES[kind]), source)


def _reversed(width: int, x: Value) -> Value:
    bits = np.unpackbits(np.asarray(x)[..., None].view(np.uint8), axis=-1, bitorder="little")
    return np.packbits(bits[..., ::-1], axis=-1, bitorder="little").view(x.dtype)[..., 0]


def _leading_zeros(width: int, x: Value) -> Value:
    for shift in (1, 2, 4, 8, 16, 32)[: width.bit_length() - 1]:
        x = x | x >> x.dtype.type(shift)
    return (width - np.bitwise_count(x)).astype(np.uint32)


BITS = {
    "popc": lambda width, x: np.bitwise_count(x).astype(np.uint32),
    "clz": _leading_zeros,
    "brev": _reversed,
}


@makes("shf", "l r wrap clamp b32")
def funnel_shift(machine: Machine, i: Instruction) -> Step:
    """Of the 64 bits of b and a: the upper half after a shift to the left, the lower one after one to the right."""
    a, b, amount = (machine.registers.source(arg, "u32") for arg in i.args[1:])
    left, wrap = "l" in i.mods, "wrap" in i.mods

    def shifted(a: Value, b: Value, amount: Value) -> Value:
        both = b.astype(np.uint64) << np.uint64(32) | a
        count = (amount & np.uint32(31) if wrap else np.minimum(amount, np.uint32(32))).astype(np.uint64)
        return ((both << count >> np.uint64(32)) if left else (both >> count)).astype(np.uint32)

    return elementwise(machine.registers.target(i.args[0], "b32"), shifted, a, b, amount)


@makes("prmt", "b32")
def permute(machine: Machine, i: Instruction) -> Step:
    """Each 4 bits of the selector name one of the 8 bytes of b and a; with the highest of them, copies of its sign."""
    a, b, selector = (machine.registers.source(arg, "u32") for arg in i.args[1:])
    return elementwise(machine.registers.target(i.args[0], "b32"), _permute, a, b, selector)


def _permute(a: Value, b: Value, selector: Value) -> Value:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    made = np.uint32(0)
    for n in range(4):
        chosen = selector >> np.uint32(4 * n)
        byte = (both >> (chosen & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(np.uint8)
        signs = (byte.view(np.int8) >> np.int8(7)).view(np.uint8)
        made = made | np.where(chosen & np.uint32(8), signs, byte).astype(np.uint32) << np.uint32(8 * n)
    return made
