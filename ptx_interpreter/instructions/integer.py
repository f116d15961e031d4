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


@makes("popc", "b32 b64")
def count(machine: Machine, i: Instruction) -> Step:
    """How many bits are set."""
    source = machine.registers.source(i.args[1], unsigned(SIZES[type_of(i.mods)]))
    return elementwise(machine.registers.target(i.args[0], "u32"), np.bitwise_count, source)


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
