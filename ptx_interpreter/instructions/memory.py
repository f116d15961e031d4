"""ld and st."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..body import Address, Instruction
from ..memory import BASE, WORDS
from ..report import NEARLY_EQUAL, POISONED, UNEQUAL
from ..rounding import holds_poison, nearly_equal
from ..step import Active, Step, by_lanes, elementwise, makes, put, several
from ..types import CARRIERS, DTYPES, SHIFTS, SIZES, Array, Unsupported, Value, last_type, unsigned
from ..watch import Access

if TYPE_CHECKING:
    from ..machine import Machine

TYPES = "b8 u8 s8 b16 u16 s16 b32 u32 s32 f32 b64 u64 s64 f64"


def address_space(i: Instruction) -> str:
    """Generic addresses are those of global memory, as nothing makes others."""
    return next((mod for mod in i.mods if mod in ("shared", "param")), "global")


def bind_addresses(machine: Machine, address: object) -> Callable[[Active | None], Array]:
    """A call that gives int64 addresses of the active lanes."""
    if not isinstance(address, Address):
        raise Unsupported(f"the address {address}")
    base, offset = address
    declared = machine.body.register_type(base)
    size = SIZES[declared] if declared else 8
    source = machine.registers.source(base, unsigned(size))
    if not isinstance(source, np.ndarray):
        fixed = np.full(machine.lanes, int(source) + offset, np.int64)
        return lambda active: fixed if active is None else fixed[active.lanes]
    if size == 4:
        return lambda active: (source if active is None else source[active.lanes]).astype(np.int64) + offset
    signed = source.view(np.int64)
    if offset == 0:
        return lambda active: signed if active is None else signed[active.lanes]
    return lambda active: (signed if active is None else signed[active.lanes]) + offset


def read_global(machine: Machine, access: Access, active: Active | None, addresses: Array) -> Array:
    """Words, zeros where nothing may be read."""
    good = machine.checks.check_global(access, active, addresses)
    carrier, shift = CARRIERS[access.size], SHIFTS[access.size]
    if good is None:
        words = np.empty(len(addresses), carrier)
        WORDS[access.size].take((addresses - BASE) >> shift, out=words, mode="clip")
    else:
        words = np.zeros(len(addresses), carrier)
        words[good] = WORDS[access.size][(addresses[good] - BASE) >> shift]
    return words


def read_shared(machine: Machine, access: Access, active: Active | None, addresses: Array) -> Array:
    """Words, those of other places where nothing may be read."""
    places, _ = machine.checks.check_shared(access, active, addresses)
    words: Array = machine.shared.words[access.size].take(places >> SHIFTS[access.size], mode="clip")
    return words


def _vector(arg: object) -> list[str]:
    return arg if isinstance(arg, list) else [str(arg)]


CACHING = "ca cg cs cv wb wt nc volatile relaxed acquire release cta gpu sys L1::evict_last L1::evict_first"
CACHING += " L1::no_allocate L1::evict_unchanged L1::evict_normal L2::cache_hint"
"""Caching and memory order change no result within one process."""


@makes("ld", f"global shared param {CACHING} v2 v4 {TYPES}")
def load(machine: Machine, i: Instruction) -> Step:
    space, kind = address_space(i), last_type(i.mods)
    names = _vector(i.args[0])
    targets = [machine.registers.target(name, kind) for name in names]
    if space == "param":
        return _load_param(machine, i, targets, kind)
    addresses = bind_addresses(machine, i.args[1])
    access = machine.checks.access(Access(i, space, SIZES[kind] * len(names)))
    read = read_shared if space == "shared" else read_global
    dtype = DTYPES[kind]

    def run(active: Active | None) -> None:
        words = read(machine, access, active, addresses(active))
        if len(targets) == 1:
            put(targets[0], active, words.view(dtype))
        else:
            columns = words.view(dtype).reshape(-1, len(targets))
            for n, target in enumerate(targets):
                put(target, active, columns[:, n])

    return by_lanes(run)


def _load_param(machine: Machine, i: Instruction, targets: list[Array | None], kind: str) -> Step:
    """Loads one number for all lanes; with the address in a register, one for each lane."""
    size, address = SIZES[kind], i.args[1]
    if not isinstance(address, Address) or address.base not in machine.registers.symbols:
        return _gather_params(machine, i, targets, kind)
    first = machine.registers.symbols[address.base] + address.offset
    steps = []
    for n, target in enumerate(targets):
        where = machine.params[first + n * size : first + (n + 1) * size]
        if len(where) < size:
            raise Unsupported("a parameter behind the last one")
        steps.append(elementwise(target, lambda where=where: where.copy().view(DTYPES[kind])[0]))
    return several(steps)


def _gather_params(machine: Machine, i: Instruction, targets: list[Array | None], kind: str) -> Step:
    addresses, size = bind_addresses(machine, i.args[1]), SIZES[kind]
    whole = size * len(targets)

    def run(active: Active | None) -> None:
        at = addresses(active)
        outside = (at < 0) | (at + whole > len(machine.params))
        if outside.any():
            lanes = machine.all_lanes if active is None else active.lanes
            detail = f"load at byte {int(at[np.argmax(outside)])} of {len(machine.params)} of parameters"
            machine.fault("out of bounds", i, lanes[outside], detail)
            at = np.where(outside, 0, at)
        values = machine.params[at[:, None] + np.arange(whole)].view(DTYPES[kind])
        for n, target in enumerate(targets):
            put(target, active, values[:, n])

    return by_lanes(run)


@makes("st", f"global shared {CACHING} v2 v4 {TYPES}")
def store(machine: Machine, i: Instruction) -> Step:
    space, size = address_space(i), SIZES[last_type(i.mods)]
    sources = [machine.registers.source(arg, unsigned(size)) for arg in _vector(i.args[1])]
    addresses = bind_addresses(machine, i.args[0])
    access = machine.checks.access(Access(i, space, size * len(sources), write=True))
    write = write_shared if space == "shared" else write_global
    dtype, carrier = DTYPES[unsigned(size)], CARRIERS[access.size]

    def run(active: Active | None) -> None:
        count = machine.lanes if active is None else len(active.lanes)
        words = np.empty((count, len(sources)), dtype)
        for n, source in enumerate(sources):
            words[:, n] = select_active(source, active)
        write(machine, access, active, addresses(active), words.view(carrier).reshape(-1))

    return by_lanes(run)


def select_active(source: Value, active: Active | None) -> Value:
    """The values of the active lanes; a number stays one."""
    return source if active is None or not isinstance(source, np.ndarray) else source[active.lanes]


def write_global(machine: Machine, access: Access, active: Active | None, addresses: Array, words: Array) -> None:
    good = machine.checks.check_global(access, active, addresses)
    size = SIZES[last_type(access.instruction.mods)]
    if machine.memory.poisoned and size in (2, 4):
        poison = holds_poison(words.view(DTYPES[unsigned(size)]).reshape(len(words), -1)).any(1)
        if poison.any():
            lanes = machine.all_lanes if active is None else active.lanes
            machine.fault("masked off", access.instruction, lanes[poison], POISONED)
    _write(machine, access, active, good, WORDS[access.size], (addresses - BASE) >> SHIFTS[access.size], words)


def write_shared(machine: Machine, access: Access, active: Active | None, addresses: Array, words: Array) -> None:
    places, good = machine.checks.check_shared(access, active, addresses)
    memory, at = machine.shared.words[access.size], places >> SHIFTS[access.size]
    _write(machine, access, active, good, memory, at, words)


def _write(
    machine: Machine, access: Access, active: Active | None, good: Array | None, memory: Array, at: Array, words: Array
) -> None:
    """Writes the `good` lanes' words, and compares what several lanes wrote to one place."""
    if good is not None:
        at, words = at[good], words[good]
    memory[at] = words
    if machine.checks.collided:
        machine.checks.collided = False
        lanes = machine.all_lanes if active is None else active.lanes
        lanes = lanes if good is None else lanes[good]
        element = unsigned(min(SIZES[last_type(access.instruction.mods)], 8))
        there, mine = (v.view(DTYPES[element]).reshape(len(words), -1) for v in (memory[at], words))
        lost, near = (there != mine).any(1), nearly_equal(there, mine).all(1)
        if lost.any():
            machine.fault("race", access.instruction, lanes[lost], NEARLY_EQUAL if near.all() else UNEQUAL)
