"""cp.async: copies that arrive in shared memory when a thread waits for them. Fences order nothing here: accesses of
one process are in the order of the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..body import Instruction
from ..shared import WRITTEN
from ..step import NO_STEP, Active, Step, by_lanes, makes
from ..types import CARRIERS, SHIFTS, Array, Unsupported
from ..watch import Access
from .memory import bind_addresses, read_global, select_active

if TYPE_CHECKING:
    from ..machine import Machine


@makes("cp", "async ca cg shared global commit_group wait_group wait_all")
def copy(machine: Machine, i: Instruction) -> Step:
    if "commit_group" in i.mods:
        return by_lanes(lambda active: _commit(machine, active))
    if "wait_all" in i.mods:
        return by_lanes(lambda active: _wait(machine, active, None))
    if "wait_group" in i.mods:
        pending = machine.registers.number(i.args[0])
        if pending is None:
            raise Unsupported("a wait for a number of groups in a register")
        return by_lanes(lambda active: _wait(machine, active, pending))
    return _copy(machine, i)


def _commit(machine: Machine, active: Active | None) -> None:
    if active is None:
        machine.groups += 1
    else:
        machine.groups[active.lanes] += 1


def _wait(machine: Machine, active: Active | None, pending: int | None) -> None:
    """Until all but the last `pending` groups of a lane have arrived; None: until all copies have."""
    left = []
    for lanes, places, words, groups in machine.copies:
        done = np.ones(len(lanes), bool) if pending is None else groups < machine.groups[lanes] - pending
        if active is not None:
            done &= active.mask[lanes]
        _arrive(machine, lanes[done], places[done], words[done])
        if not done.all():
            left.append((lanes[~done], places[~done], words[~done], groups[~done]))
    machine.copies = left


def _arrive(machine: Machine, lanes: Array, places: Array, words: Array) -> None:
    size, shared = words.itemsize, machine.shared
    shared.words[size][places >> SHIFTS[size]] = words
    if machine.watch:
        cells, each = shared.cells_at(places, size)
        shared.note_write(cells, np.repeat(machine.stamps[lanes], each), WRITTEN)


def _copy(machine: Machine, i: Instruction) -> Step:
    """[to], [of], size, and how many bytes to read of it; the others are zeros."""
    to, source = bind_addresses(machine, i.args[0]), bind_addresses(machine, i.args[1])
    size = machine.registers.number(i.args[2])
    if size not in (4, 8, 16):
        raise Unsupported("a copy of such a size")
    amount = machine.registers.source(i.args[3], "u32") if len(i.args) > 3 else np.uint32(size)
    reads = machine.checks.access(Access(i, "global", size))
    writes = machine.checks.access(Access(i, "shared", size, write=True, arriving=True))

    def run(active: Active | None) -> None:
        lanes = machine.all_lanes if active is None else active.lanes
        places, good = machine.checks.check_shared(writes, active, to(active))
        machine.checks.collided = False
        byte_counts = np.broadcast_to(select_active(amount, active), len(lanes))
        if ((byte_counts != 0) & (byte_counts != size)).any():
            raise Unsupported(f"to copy a part of {size} bytes in `{i.text}` at {machine.body.where(i.line)}")
        words = np.zeros(len(lanes), CARRIERS[size])
        nonzero = byte_counts != 0
        if nonzero.all():
            words[:] = read_global(machine, reads, active, source(active))
        elif nonzero.any():
            readers = Active.from_lanes(lanes[nonzero], machine.lanes)
            words[nonzero] = read_global(machine, reads, readers, source(readers))
        if good is not None:
            lanes, places, words = lanes[good], places[good], words[good]
        machine.copies.append((lanes, places, words, machine.groups[lanes]))

    return by_lanes(run)


@makes("fence membar", "proxy async shared cta gl sc acq_rel gpu sys")
@makes("createpolicy", "fractional L2::evict_first L2::evict_last L2::evict_normal b64")
def ignore(machine: Machine, i: Instruction) -> Step:
    """Fences and cache policies."""
    return NO_STEP
