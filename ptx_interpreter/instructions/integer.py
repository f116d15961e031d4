"""Bits: logic, shifts, fields."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..body import Instruction
from ..step import Step, elementwise, makes
from ..types import DTYPES, SIZES, Value, last_type

if TYPE_CHECKING:
    from ..machine import Machine


@makes("shl shr", "b16 b32 b64 u16 u32 u64 s16 s32 s64")
def shift(machine: Machine, i: Instruction) -> Step:
    """A shift by amounts that are clamped to the width, beyond which all bits are zeros, or copies of the sign."""
    kind = last_type(i.mods)
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


def field(value: Value, start: Value, length: Value) -> Value:
    """`length` bits from `start` on, extended by zeros or by the field's sign."""
    # In 64 bits the bits above the value are copies of its sign, or zeros, as in PTX.
    wide = value.astype(np.int64)
    start, length = (np.minimum(v & np.uint32(0xFF), 32).astype(np.int64) for v in (start, length))
    unused = 64 - length
    if value.dtype.kind == "i":
        return np.where(length == 0, 0, (wide >> start) << (unused & 63) >> (unused & 63))
    return (wide >> start) & ((np.int64(1) << length) - 1)


def insert(value: Value, into: Value, start: Value, length: Value) -> Value:
    """The low `length` bits of the value in place of the bits of `into` from `start` on."""
    # numpy shifts zeros in, however far.
    start, length = (np.minimum(v & np.uint32(0xFF), 64).astype(np.uint64) for v in (start, length))
    mask = ~(~np.uint64(0) << length) << start
    return (into & ~mask | value.astype(np.uint64) << start & mask).astype(into.dtype)


def permute(a: Value, b: Value, selector: Value) -> Value:
    """Each 4 bits of the selector name one of the 8 bytes of b and a; with the highest of them, copies of its sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    made = np.uint32(0)
    for n in range(4):
        chosen = selector >> np.uint32(4 * n)
        byte = (both >> (chosen & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(np.uint8)
        signs = (byte.view(np.int8) >> np.int8(7)).view(np.uint8)
        made = made | np.where(chosen & np.uint32(8), signs, byte).astype(np.uint32) << np.uint32(8 * n)
    return made


TABLE: dict[str, tuple[str, Any, str, str]] = {
    "and": ("pred b16 b32 b64", np.bitwise_and, "own own", "own"),
    "or": ("pred b16 b32 b64", np.bitwise_or, "own own", "own"),
    "xor": ("pred b16 b32 b64", np.bitwise_xor, "own own", "own"),
    "not": ("pred b16 b32 b64", np.invert, "own", "own"),
    "bfe": ("u32 s32", field, "own u32 u32", "own"),
    "bfi": ("b32 b64", insert, "own own u32 u32", "own"),
    "popc": ("b32 b64", np.bitwise_count, "own", "u32"),
    "prmt": ("b32", permute, "own own own", "own"),
}
"""Types, function, types of the sources and of the result, by opcode; `own` is the type of the instruction."""


def tabulated(machine: Machine, i: Instruction) -> Step:
    """An instruction of `TABLE`."""
    _, function, kinds, result = TABLE[i.op]
    names = [last_type(i.mods) if kind == "own" else kind for kind in (*kinds.split(), result)]
    sources = [machine.registers.source(arg, kind) for arg, kind in zip(i.args[1:], names[:-1], strict=True)]
    return elementwise(machine.registers.target(i.args[0], names[-1]), function, *sources)


for _opcode, (_types, *_) in TABLE.items():
    makes(_opcode, _types)(tabulated)
