"""Instructions of a whole warp: shuffles, reductions, votes and barriers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..body import Instruction
from ..shared import WARP_BARRIER
from ..step import Active, Step, by_lanes, makes, put
from ..types import WARP, Array, Unsupported, last_type

if TYPE_CHECKING:
    from ..machine import Machine

EVERY_LANE = (-1, 0xFFFFFFFF)


def find_groups(machine: Machine, active: Active | None, i: Instruction, size: int = WARP) -> Array | None:
    """The numbers of the warps (or of groups of so many threads) that run, with all of their threads; None: all do."""
    if active is None:
        return None
    rows = active.mask.reshape(-1, size)
    some = np.logical_or.reduce(rows, axis=1)
    absent = some[:, None] & ~rows
    if absent.any():
        lanes = np.flatnonzero(absent.reshape(-1))
        machine.fault("divergent warp", i, lanes, "this thread isn't there, and all of a warp must be")
    return np.flatnonzero(some)


@makes("shfl", "sync bfly idx up down b32")
def shuffle(machine: Machine, i: Instruction) -> Step:
    """d|p, a, b, c, members. c holds the last lane that may be read, and in bits 8 to 12 a mask of segments."""
    name, _, flag = str(i.args[0]).partition("|")
    registers = machine.registers
    value, (b, c) = registers.source(i.args[1], "u32"), (registers.source(arg, "u32") for arg in i.args[2:4])
    target, in_range = registers.target(name, "u32"), registers.target(flag or "_", "pred")
    if registers.number(i.args[4]) not in EVERY_LANE:
        raise Unsupported("a shuffle of some lanes of a warp")
    lane = machine.lane_of_warp
    first = machine.all_lanes - lane

    def plan() -> tuple[Array, Array]:
        offset, clamp = (np.asarray(v).astype(np.int64) for v in (b, c))
        segment = (clamp >> 8) & 31
        last = (lane & segment) | (clamp & 31 & ~segment)
        offset = offset & 31
        if "up" in i.mods:
            chosen = lane - offset
            inside = chosen >= last
        else:
            chosen = {"bfly": lane ^ offset, "down": lane + offset}.get(
                i.mods[1], (lane & segment) | (offset & ~segment)
            )
            inside = chosen <= last
        return first + np.where(inside, chosen, lane), inside

    fixed = None if isinstance(b, np.ndarray) or isinstance(c, np.ndarray) else plan()

    def run(active: Active | None) -> None:
        source, inside = fixed or plan()
        if active is not None:
            source, inside = source[active.lanes], inside[active.lanes]
            asleep = ~active.mask[source]
            if asleep.any():
                detail = "it takes the value of a thread that isn't there"
                machine.fault("divergent warp", i, active.lanes[asleep], detail)
        put(target, active, value[source] if isinstance(value, np.ndarray) else value)
        put(in_range, active, inside)

    return by_lanes(run)


REDUCTIONS: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "any": np.logical_or,
    "all": np.logical_and,
}


@makes("redux", "sync add min max and or xor u32 s32 b32")
@makes("vote", "sync any all pred")
def reduce(machine: Machine, i: Instruction) -> Step:
    """The sum (or minimum, ...) of a value over all lanes of a warp, or whether a predicate holds in any or all."""
    registers, kind = machine.registers, last_type(i.mods)
    value, target = registers.source(i.args[1], kind), registers.target(i.args[0], kind)
    if registers.number(i.args[2]) not in EVERY_LANE:
        raise Unsupported(f"{i.op} of some lanes of a warp")
    function = REDUCTIONS[i.mods[1]]

    def run(active: Active | None) -> None:
        find_groups(machine, active, i)  # All of a warp must be there.
        rows = np.broadcast_to(value, machine.all_lanes.shape).reshape(-1, WARP)
        totals = np.repeat(function.reduce(rows, axis=1, dtype=rows.dtype), WARP)
        put(target, active, totals if active is None else totals[active.lanes])

    return by_lanes(run)


@makes("bar", "warp sync")
def barrier(machine: Machine, i: Instruction) -> Step:
    """bar.warp.sync. Lanes that come later than the others of their warp are taken to be missing."""
    if machine.registers.number(i.args[0]) not in EVERY_LANE:
        raise Unsupported("a barrier of some lanes of a warp")

    def run(active: Active | None) -> None:
        if active is None:
            machine.stamps += WARP_BARRIER
            return
        rows = active.mask.reshape(-1, WARP)
        some = np.logical_or.reduce(rows, axis=1)
        missing = some[:, None] & ~rows & machine.alive.reshape(-1, WARP)
        if missing.any():
            lanes = np.flatnonzero(missing.reshape(-1))
            machine.fault("divergent warp", i, lanes, "this thread isn't at the barrier of its warp")
        machine.stamps[np.repeat(some, WARP)] += WARP_BARRIER

    return by_lanes(run)
