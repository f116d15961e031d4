"""Checks accesses to memory: bounds, alignment, what has been written, races; and counts their traffic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from . import shared as sm
from .body import Instruction
from .memory import MANY, Interval, Shadow
from .step import Active
from .traffic import Traffic, by_warp, cycles
from .types import Array

if TYPE_CHECKING:
    from .machine import Machine


@dataclass(slots=True)
class Access:
    """The access of an instruction to memory, `size` bytes a lane.

    `together`: the lanes of a warp read as one. `arriving`: the written value is there after a wait.
    `atomic`: the order of an access that is.
    """

    instruction: Instruction
    space: str
    size: int
    write: bool = False
    together: bool = False
    arriving: bool = False
    atomic: str = ""
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def verb(self) -> str:
        return "store" if self.write else "load"

    @property
    def reads(self) -> bool:
        return not self.write or (bool(self.atomic) and "exch" not in self.instruction.mods)


class Watch:
    """The checks of a machine.

    They return the accesses that may be made: a mask over the active lanes, None for all.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.accesses: list[Access] = []
        self.collided = False
        """Whether several lanes of a block wrote a cell at once; the store compares what they wrote."""

    def access(self, access: Access) -> Access:
        """Counts it from now on."""
        self.accesses.append(access)
        return access

    def _fault(self, kind: str, access: Access, lanes: Array, detail: str) -> None:
        self.machine.fault(kind, access.instruction, lanes, detail)

    def _count_global(self, access: Access, active: Active | None, addresses: Array) -> None:
        report = self.machine.report
        sectors_table = report.stores if access.write else report.loads
        requests, sectors = sectors_table.add(by_warp(active, addresses), access.size)
        access.traffic.add(Traffic(requests, sectors, len(addresses) * access.size))

    # --- global memory -------------------------------------------------------------------------------------------

    def check_global(self, access: Access, active: Active | None, addresses: Array) -> Array | None:
        size, good = access.size, None
        if size > 1 and (off := addresses & (size - 1)).any():
            good = off == 0
            near = self.machine.memory.near(int(addresses[np.argmin(good)]))
            self._fault("misaligned", access, self._lanes(active)[~good], f"{access.verb} of {size} bytes {near}")
        interval, outside = self.machine.memory.find(addresses, size)
        if outside is not None:
            near = self.machine.memory.near(int(addresses[np.argmax(outside)]))
            detail = f"{access.verb} of {size} bytes {near}"
            self._fault("out of bounds", access, self._lanes(active)[outside], detail)
            good = ~outside if good is None else good & ~outside
        if self.machine.watch:
            lanes = self._lanes(active)
            if good is None:
                self._watch_global(access, lanes, addresses, interval)
            elif good.any():
                self._watch_global(access, lanes[good], addresses[good], None)
            if access.atomic:
                self._note_order(access, lanes)
        if self.machine.count:
            self._count_global(access, active, addresses)
        return good

    def _watch_global(self, access: Access, lanes: Array, addresses: Array, inside: Interval | None) -> None:
        if inside is not None:
            if inside.shadow is not None:
                self._note_global(access, inside, addresses, lanes)
        elif len(addresses) and self.machine.memory.intervals:
            for interval, mask in self.machine.memory.holders(addresses):
                if interval.shadow is not None:
                    self._note_global(access, interval, addresses[mask], lanes[mask])

    def _note_global(self, access: Access, interval: Interval, addresses: Array, lanes: Array) -> None:
        shadow = interval.shadow
        assert shadow is not None
        if access.size < shadow.cell:
            shadow.divide(access.size)
        each = max(1, access.size // shadow.cell)
        cells = (addresses - interval.start) // shadow.cell
        if each > 1:
            cells = cells[:, None] + np.arange(each)
        mine = np.broadcast_to(self.machine.block_numbers[lanes].reshape((-1,) + (1,) * (cells.ndim - 1)), cells.shape)
        stamps = np.broadcast_to(self.machine.stamps[lanes].reshape((-1,) + (1,) * (cells.ndim - 1)), cells.shape)
        writer = shadow.writer[cells]
        reader = shadow.reader[cells]
        memory = self.machine.memory
        # Another block's access is over if it has released since, and this block acquired.
        acquired, written_at, read_at = memory.acquired[mine], shadow.written_at[cells], shadow.read_at[cells]
        both = shadow.atomic[cells] if access.atomic else np.bool_(False)
        near = (writer == mine) & _unordered(shadow.written[cells], stamps) & ~both
        is_over = (acquired > read_at) & ((reader == MANY) | (memory.released[reader] > read_at))
        reader = np.where(is_over, 0, reader)
        self._blame(access, lanes, near, "race", f"another thread wrote to {interval.name} there, without a barrier")
        if access.reads:
            never = writer == 0
            self._blame(access, lanes, never, "uninitialised", f"nothing has been written to {interval.name} there")
        others = (writer > 0) & (writer != mine) & ~both
        others &= ~((acquired > written_at) & (memory.released[writer] > written_at))
        if access.write:
            read = (reader == MANY) | (reader > 0) & (reader != mine)
            near = (reader == mine) & _unordered(shadow.read[cells], stamps)
            self._blame(access, lanes, near, "race", f"another thread read {interval.name} there, without a barrier")
            shadow.writer[cells], shadow.written[cells], shadow.written_at[cells] = mine, stamps, memory.clock
            shadow.atomic[cells] = bool(access.atomic)
            if not access.atomic:
                others |= shadow.writer[cells] != mine
                self.collided |= bool(((shadow.writer[cells] == mine) & (shadow.written[cells] != stamps)).any())
            self._blame(access, lanes, read, "race", f"another block reads what this writes to {interval.name}")
            self._blame(access, lanes, others, "race", f"another block writes to {interval.name} there too")
        else:
            self._blame(access, lanes, others, "race", f"another block writes what this reads of {interval.name}")
            shadow.reader[cells] = reader
            _note_readers(shadow, cells, mine)
            # The first thread's stays: where threads hold copies of a value, compilers let it write.
            shadow.read[cells[::-1]], shadow.read_at[cells] = stamps[::-1], memory.clock

    def _note_order(self, access: Access, lanes: Array) -> None:
        """Notes that these blocks released what they wrote, or acquired what others had released."""
        memory, blocks = self.machine.memory, np.unique(self.machine.block_numbers[lanes])
        memory.clock += 1
        if access.atomic in ("release", "acq_rel"):
            memory.released[blocks] = memory.clock
        if access.atomic in ("acquire", "acq_rel"):
            memory.acquired[blocks] = memory.clock

    def _blame(self, access: Access, lanes: Array, wrong: Array, kind: str, detail: str) -> None:
        if wrong.any():
            self._fault(kind, access, lanes[wrong.reshape(len(lanes), -1).any(1)], detail)

    # --- shared memory -------------------------------------------------------------------------------------------

    def check_shared(self, access: Access, active: Active | None, addresses: Array) -> tuple[Array, Array | None]:
        """Addresses are those in a block's window; returns also the bytes in the memory of all blocks."""
        machine, size, good = self.machine, access.size, None
        if size > 1 and (off := addresses & (size - 1)).any():
            good = off == 0
            address = int(addresses[np.argmin(good)])
            detail = f"{size} bytes at byte {address} of shared memory"
            self._fault("misaligned", access, self._lanes(active)[~good], detail)
        if addresses.max(initial=0) + size > machine.shared.size or addresses.min(initial=0) < 0:
            wrong = (addresses + size > machine.shared.size) | (addresses < 0)
            detail = (
                f"{access.verb} at byte {int(addresses[np.argmax(wrong)])} of {machine.shared.size} of shared memory"
            )
            self._fault("out of bounds", access, self._lanes(active)[wrong], detail)
            good = ~wrong if good is None else good & ~wrong
        places = addresses + (machine.shared_base if active is None else machine.shared_base[active.lanes])
        if machine.watch:
            lanes = self._lanes(active)
            stamps = machine.stamps if active is None else machine.stamps[lanes]
            if good is None:
                self.watch_shared(access, places, stamps, lanes)
            elif good.any():
                self.watch_shared(access, places[good], stamps[good], lanes[good])
        if machine.count:
            access.traffic.add(cycles(active, addresses, size))
        return places, good

    def watch_shared(self, access: Access, places: Array, stamps: Array, lanes: Array) -> None:
        shared = self.machine.shared
        cells, each = shared.cells_at(places, access.size)
        if each > 1:
            stamps = np.repeat(stamps, each)

        def blame(kind: str, which: Array, detail: str) -> None:
            byte = int(places[which[0] // each] - self.machine.shared_base[lanes[which[0] // each]])
            self._fault(kind, access, lanes[np.unique(which // each)], f"{detail}, byte {byte} of shared memory")

        def race(before: Array, verb: str) -> None:
            if (which := sm.conflicts(before, stamps)) is not None:
                other = sm.stamp_thread(int(before[which[0]]))
                blame("race", which, f"thread {other} {verb} it and no barrier came between")

        writer, cell_states = shared.writer.take(cells, mode="clip"), shared.state.take(cells, mode="clip")
        # Atomics don't race with each other.
        race(np.where(cell_states == sm.BY_ATOMIC, stamps, writer) if access.atomic else writer, "wrote")
        if access.reads and (cell_states != sm.WRITTEN).any():
            if len(which := np.flatnonzero(cell_states == sm.UNWRITTEN)):
                blame("uninitialised", which, "nobody has written it")
            if len(which := np.flatnonzero(cell_states == sm.ON_ITS_WAY)):
                blame("not waited for", which, "cp.async has yet to fill it")
        if access.write:
            race(shared.reader.take(cells, mode="clip"), "read")
            race(shared.other_reader.take(cells, mode="clip"), "read")
            race(shared.near_reader.take(cells, mode="clip"), "read")
            state = sm.BY_ATOMIC if access.atomic else sm.ON_ITS_WAY if access.arriving else sm.WRITTEN
            self.collided = shared.note_write(cells, stamps, state) and not access.atomic
        else:
            shared.note_read(cells, sm.warp_stamps(stamps) if access.together else stamps)

    def _lanes(self, active: Active | None) -> Array:
        return self.machine.all_lanes if active is None else active.lanes


def _unordered(before: Array, now: Array) -> Array:
    """Which of these accesses of a block aren't ordered, as a mask."""
    mask = np.zeros(now.shape, bool)
    if (which := sm.conflicts(before.reshape(-1), now.reshape(-1))) is not None:
        mask.reshape(-1)[which] = True
    return mask


def _note_readers(shadow: Shadow, cells: Array, mine: Array) -> None:
    before = shadow.reader[cells]
    shadow.reader[cells] = mine
    several = (before != 0) & (before != mine)
    several |= shadow.reader[cells] != mine
    shadow.reader[cells[several]] = MANY
