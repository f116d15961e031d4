"""Launches kernels: registers are vectors over the threads of many blocks of a grid, and an instruction is one
operation on all of them.

Threads that are at the same basic block run it together. If they are at several, the first one in the text runs, which
brings threads together again that a branch has separated.
"""

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import shared as sm
from .body import Block, Instruction
from .instructions import make
from .memory import GlobalMemory
from .parse import Kernel
from .registers import Dim3, Registers
from .report import NEARLY_EQUAL, Fault, Faults, Report
from .rounding import numpy_errors
from .shared import SharedMemory
from .step import Active, Step
from .traffic import Traffic
from .types import SIZES, WARP, Array, Unsupported
from .watch import Watch

LANES = 8192
"""That run together, at most, unless a single block has more."""
MACHINES_BYTES = 1 << 29
MOST_VISITS = 5_000_000
"""Maximum number of runs of a basic block by one machine; a loop that needs more counts as endless."""

BYTES_OF_STEP = 2048
"""About what Python's objects for one take."""

Masks = dict[int, Array]
"""Which lanes are at a block of instructions, by its number."""


class Machine:
    """Runs `blocks` blocks of a launch at a time.

    A lane is a thread of one of the blocks; each block begins at a whole warp, so that there may be lanes without one.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: Dim3,
        block: Dim3,
        blocks: int,
        memory: GlobalMemory,
        dynamic_shared: int,
        watch: bool,
        count: bool,
    ) -> None:
        self.kernel, self.body, self.blocks, self.memory = kernel, kernel.parsed, blocks, memory
        self.threads = block[0] * block[1] * block[2]
        self.pitch = -(-self.threads // WARP) * WARP  # of a block, in lanes
        self.lanes = self.pitch * blocks
        self.all_lanes = np.arange(self.lanes)
        self.block_index = self.all_lanes // self.pitch
        self.thread_index = self.all_lanes % self.pitch
        self.lane_of_warp = self.all_lanes % WARP
        self.exists = self.thread_index < self.threads
        self.registers = Registers(self.body, self.thread_index, grid, block)
        self.params = np.zeros(kernel.param_bytes, np.uint8)
        self.watch, self.count = watch, count
        self.checks = Watch(self)
        self._code: dict[int, ReadyBlock] = {}
        self._steps = 0
        size = self._place_symbols() + dynamic_shared
        self.shared = SharedMemory(self.blocks, size, _narrowest_shared(self.body.blocks))
        self.shared_base = self.block_index.astype(np.int64) * self.shared.pitch

    def _place_symbols(self) -> int:
        """Gives names their addresses; returns where dynamic shared memory begins."""
        symbols = self.registers.symbols
        symbols.update({param.name: param.offset for param in self.kernel.params})
        symbols.update(dict.fromkeys(self.kernel.module.texts, 0))  # which kernels pass on and don't read
        used = {part for b in self.body.blocks for i in b.instructions for part in map(_base_name, i.args)}
        variables = [v for v in self.kernel.module.shared + self.body.shared if v.name in used]
        end = 0
        for variable in variables:
            if variable.size:
                symbols[variable.name] = -(-end // variable.align) * variable.align
                end = symbols[variable.name] + variable.size
        end = -(-end // 16) * 16
        symbols.update({variable.name: end for variable in variables if not variable.size})
        return end

    @property
    def size(self) -> int:
        """The approximate size in bytes."""
        shared = len(self.shared.bytes) + 8 * 4 * len(self.shared.writer)
        return self.registers.bytes + shared + BYTES_OF_STEP * self._steps

    # --- faults --------------------------------------------------------------------------------------------------

    def fault(self, kind: str, instruction: Instruction, lanes: Array, detail: str) -> None:
        where = self.body.where(instruction.line)
        key = (kind, instruction.text, where, detail == NEARLY_EQUAL)
        for earlier in self.report.faults:
            if (earlier.kind, earlier.instruction, earlier.where, earlier.detail == NEARLY_EQUAL) == key:
                earlier.count += len(lanes)
                return
        lane = int(lanes[0])
        who = (self.first_block + int(self.block_index[lane]), int(self.thread_index[lane]))
        self.report.faults.append(Fault(kind, instruction.text, where, detail, *who, len(lanes)))

    # --- running -------------------------------------------------------------------------------------------------

    def run(self, params: bytes, first_block: int, report: Report) -> None:
        """Runs the blocks of the grid from this one on."""
        self._begin(params, first_block, report)
        pending: Masks = {0: self.alive.copy()}
        visits: Counter[int] = Counter()
        threads: Counter[int] = Counter()
        warps: Counter[int] = Counter()
        while pending or self._pass_barrier(pending):
            number = self._next(pending)
            mask = pending.pop(number)
            code = self._code.get(number)
            if code is None:
                code = self._code[number] = ReadyBlock(self, self.body.blocks[number])
                self._steps += len(code.for_all)
            active = int(np.count_nonzero(mask))
            threads[number] += active
            if self.count:
                warps[number] += int(np.count_nonzero(mask.reshape(-1, WARP).any(1)))
            visits[number] += 1
            if active == self.lanes:
                for operation in code.for_all:
                    operation()
            else:
                some = Active(mask)
                for step, everyone in code.for_some:
                    if everyone:
                        step.everyone()
                    else:
                        step.some(some)
            self._leave(code, mask, active, pending)
            if visits[number] > MOST_VISITS:
                detail = f"{MOST_VISITS} times through this loop; it is taken to have no end"
                self.fault("endless loop", code.last, np.flatnonzero(mask), detail)
                break
        report.blocks.update(threads)
        report.warps.update(warps)
        self._add_traffic(report)

    def _next(self, pending: Masks) -> int:
        """The first block of instructions in the text, but none where a warp meets that isn't complete yet."""
        first = min(pending)
        if len(pending) == 1 or not self.body.meetings:
            return first
        for number in sorted(pending):
            if number not in self.body.meetings or not self._is_awaited(number, pending):
                return number
        return first

    def _is_awaited(self, number: int, pending: Masks) -> bool:
        """Whether others of the warps (or warpgroups) that are at a block are still on their way."""
        size = self.body.meeting_size if self.pitch % self.body.meeting_size == 0 else WARP
        here = np.logical_or.reduce(pending[number].reshape(-1, size), axis=1)
        others = (mask.reshape(-1, size)[here] for other, mask in pending.items() if other != number)
        return any(mask.any() for mask in others)

    def _begin(self, params: bytes, first_block: int, report: Report) -> None:
        self.report, self.first_block = report, first_block
        self.params[:] = np.frombuffer(bytearray(params), np.uint8)
        numbers = first_block + self.block_index
        self.block_numbers = (numbers + 1).astype(np.int32)
        self.registers.set_block(numbers)
        self.shared.forget()
        self.stamps = sm.first_stamps(self.thread_index)
        self.copies: list[tuple[Array, Array, Array, Array]] = []  # cp.async: lanes, places, words, groups
        self.groups = np.zeros(self.lanes, np.int64)  # committed by each lane
        self.alive = self.exists.copy()
        self.waiting: Masks = {}
        for access in self.checks.accesses:
            access.traffic = Traffic()

    def _add_traffic(self, report: Report) -> None:
        if self.count:
            for access in self.checks.accesses:
                space = access.space + (" store" if access.write else "")
                key = (space, self.body.where(access.instruction.line), access.instruction.text)
                report.traffic.setdefault(key, Traffic()).add(access.traffic)

    def _leave(self, code: "ReadyBlock", mask: Array, active: int, pending: Masks) -> None:
        """Sends the lanes of a block of instructions to the targets of its last one."""
        last, taken, rest = code.last, mask, None
        if code.predicate is not None:
            taken = mask & (~code.predicate if last.unless else code.predicate)
            yes = int(np.count_nonzero(taken))
            if yes < active:
                rest = mask & ~taken if yes else mask
            if not yes:
                _join(pending, code.number + 1, mask)
                return
        if last.op == "bra":
            _join(pending, code.following[0], taken)
        elif last.op == "bar":
            _join(self.waiting, code.number, taken)
        elif last.op in ("ret", "exit", "trap"):
            if last.op == "trap":
                self.fault("trap", last, np.flatnonzero(taken), f"the kernel ends the launch with {self._said(code)}")
            self.alive &= ~taken
        else:
            _join(pending, code.number + 1, taken)
        if rest is not None:
            _join(pending, code.number + 1, rest)

    def _said(self, code: "ReadyBlock") -> str:
        """The message of a kernel that ends the launch; all of its messages if the compiler has moved it."""
        texts = self.kernel.module.texts
        messages = [texts[name] for i in code.instructions for arg in i.args if (name := _base_name(arg)) in texts]
        if not messages and code.last.text.startswith("call"):
            messages = list(texts.values())
        return "; ".join(messages) or "an error"

    def _pass_barrier(self, pending: Masks) -> bool:
        """Lets those go on who wait at a barrier, when nobody else runs; False if nobody waits.

        All threads of a block that haven't ended are then at some barrier, of which hardware lets them pass.
        """
        if not self.waiting:
            return False
        if len(self.waiting) > 1:
            self._compare_barriers()
        for number, mask in self.waiting.items():
            np.add(self.stamps, sm.BLOCK_BARRIER + sm.WARP_BARRIER, out=self.stamps, where=mask)
            _join(pending, number + 1, mask)
        self.waiting.clear()
        return True

    def _compare_barriers(self) -> None:
        there = {number: mask.reshape(self.blocks, -1).any(1) for number, mask in self.waiting.items()}
        uneven = np.sum(list(there.values()), axis=0) > 1
        for number, mask in self.waiting.items():
            lanes = np.flatnonzero(mask & np.repeat(uneven, self.pitch))
            if len(lanes):
                last = self.body.blocks[number].instructions[-1]
                self.fault("uneven barrier", last, lanes, "other threads of the block are at another barrier")


class ReadyBlock:
    """The instructions of a block as steps, each made when it is first needed."""

    def __init__(self, machine: Machine, block: Block) -> None:
        self.number, self.following = block.number, block.following
        self.instructions = block.instructions
        self.last = block.instructions[-1]
        if self.last.ends_block:
            self.instructions = block.instructions[:-1]
            _check_end(machine, self.last)
        else:
            self.last = Instruction("fall", (), [], None, False, "", (0, 0))
        steps = self._steps(machine)
        # Bound now: a block that is made ready later may give the register's vector to another one.
        self.predicate = machine.registers.source(self.last.guard, "pred") if self.last.guard else None
        self.for_all: list[Callable[[], object]] = [step.everyone for _, step in steps]
        lasting = machine.body.lasting
        self.for_some = [(step, step.pure and lasting.isdisjoint(i.writes)) for i, step in steps]

    def _steps(self, machine: Machine) -> list[tuple[Instruction, Step]]:
        """Registers that nobody reads after this block get their vector where they are first written."""
        last_use = {name: n for n, i in enumerate(self.instructions) for name in (*i.reads, *i.writes)}
        ending = defaultdict(list)
        lasting, constants = machine.body.lasting, machine.body.constants
        for name, n in last_use.items():
            if name not in lasting and name not in constants and name != self.last.guard:
                ending[n].append(name)
                machine.registers.passing.add(name)
        made = []
        for n, instruction in enumerate(self.instructions):
            if instruction.op != "mov" or constants.keys().isdisjoint(instruction.writes):
                made.append((instruction, _guarded(machine, instruction)))
            for name in ending[n]:
                machine.registers.give_back(name)
        machine.registers.passing.clear()
        return made


def _guarded(machine: Machine, i: Instruction) -> Step:
    step = make(machine, i)
    if i.guard is None:
        return step
    predicate = machine.registers.source(i.guard, "pred")

    def some(active: Active | None) -> None:
        mask = ~predicate if i.unless else predicate.copy()
        if active is not None:
            mask &= active.mask
        if mask.any():
            step.some(Active(mask))

    return Step(lambda: some(None), some, pure=False)


def _check_end(machine: Machine, last: Instruction) -> None:
    modifiers = {"bra": {"uni"}, "bar": {"sync"}}.get(last.op, set())
    if set(last.mods) - modifiers or (last.op == "bar" and last.args != ["0"]):
        raise Unsupported(f"`{last.text}` at {machine.body.where(last.line)}: not among the known forms of {last.op}")


def _join(masks: Masks, number: int, mask: Array) -> None:
    there = masks.get(number)
    masks[number] = mask if there is None else there | mask


def _base_name(arg: object) -> str:
    return str(getattr(arg, "base", arg))


def _narrowest_shared(blocks: list[Block]) -> int:
    """Bytes of the narrowest access to shared memory."""
    sizes = [16]
    for block in blocks:
        for i in block.instructions:
            if i.op in ("ld", "st", "atom", "red") and "shared" in i.mods:
                sizes.append(SIZES[i.mods[-1]])
            elif i.op == "cp" and "shared" in i.mods:
                sizes.append(4)
    return min(sizes)


# --- launches -------------------------------------------------------------------------------------------------------


_machines: OrderedDict[tuple[Any, ...], Machine] = OrderedDict()
"""The machines of the last launches: making one ready takes longer than a small launch."""


def launch(
    kernel: Kernel,
    grid: Sequence[int],
    block: Sequence[int],
    params: bytes,
    memory: GlobalMemory,
    dynamic_shared: int = 0,
    *,
    watch: bool = True,
    count: bool = True,
    check: bool = True,
) -> Report:
    """Runs a kernel for the whole grid.

    Args:
        grid, block: one to three sizes each.
        params: the packed arguments, `kernel.param_bytes` of them; `kernel.params` says where each one is.
        memory: what the kernel may touch of this process.
        dynamic_shared: bytes of shared memory of a block, in addition to the declared ones.
        watch: look for races and for reads of what nobody has written.
        count: count sectors and cycles.
        check: raise Faults at the end if there are any; else they are in the report only.

    Raises:
        ValueError: the launch doesn't fit the kernel.
        Unsupported: the kernel has an instruction that the interpreter doesn't know.
    """
    sizes = (_dim3(grid, "grid"), _dim3(block, "block"))
    if len(params) != kernel.param_bytes:
        raise ValueError(f"{kernel.name} takes {kernel.param_bytes} bytes of parameters, not {len(params)}")
    if kernel.most_threads and math.prod(sizes[1]) > math.prod(kernel.most_threads):
        raise ValueError(f"{kernel.name} allows blocks of {kernel.most_threads} threads, not {sizes[1]}")
    report = Report(kernel.name, kernel, *sizes, dynamic_shared)
    blocks = math.prod(sizes[0])
    memory.begin_launch(blocks)
    fitting = max(1, LANES // (-(-math.prod(sizes[1]) // WARP) * WARP))
    together = -(-blocks // -(-blocks // fitting))  # rounds of the same size
    with numpy_errors():
        for first in range(0, blocks, together):
            options = (dynamic_shared, watch, count)
            _machine(kernel, sizes, min(together, blocks - first), memory, options).run(params, first, report)
    if check and report.faults:
        raise Faults(report.faults)
    return report


def _dim3(sizes: Sequence[int], what: str) -> Dim3:
    x, y, z = (*sizes, 1, 1)[:3] if 1 <= len(sizes) <= 2 else sizes
    if min(x, y, z) < 1:
        raise ValueError(f"a {what} of {tuple(sizes)}")
    return x, y, z


def _machine(
    kernel: Kernel, sizes: tuple[Dim3, Dim3], blocks: int, memory: GlobalMemory, options: tuple[int, bool, bool]
) -> Machine:
    # The machine holds the kernel and the memory, so that no others come to have their numbers.
    key = (id(kernel), id(memory), sizes, blocks, options)
    machine = _machines.pop(key, None)
    if machine is None:
        machine = Machine(kernel, *sizes, blocks, memory, options[0], watch=options[1], count=options[2])
    _machines[key] = machine
    while len(_machines) > 1 and sum(each.size for each in _machines.values()) > MACHINES_BYTES:
        _, oldest = _machines.popitem(last=False)
        vars(oldest).clear()  # its parts hold each other
    return machine
