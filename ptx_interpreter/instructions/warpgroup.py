"""wgmma: products of four warps, with factors that a descriptor finds in shared memory.

The products are there at once: that nobody reads the sums, or writes the factors, before the wait is not checked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..body import Instruction
from ..step import NO_STEP, Active, Step, by_lanes, makes
from ..types import WARP, Array, Unsupported, Value
from ..watch import Access
from .matrix import numbers
from .warp import find_groups

if TYPE_CHECKING:
    from ..machine import Machine

GROUP = 4 * WARP
DEPTH = 16
"""Elements of 16 bits; of TF32 half as many, which `numbers` makes of them."""
WIDTH_OF_SWIZZLE = {0: 1, 1: 8, 2: 4, 3: 2}
"""Units of 16 bytes that are exchanged among each other, by bits 62 and 63 of a descriptor."""


def described(descriptors: Array, rows: int, transposed: bool) -> Array:
    """Where the elements [rows, 16] of 16-bit factors lie in shared memory: [descriptors, rows, 16], in bytes.

    Factors are K-major or, transposed, MN-major. A core matrix has 8 rows of 16 bytes; with a swizzle of w units it has
    8 rows of 16 w bytes. The strides of a descriptor lead from one to the next.
    """
    if ((descriptors >> 49) & 7).any():
        raise Unsupported("a matrix descriptor with a base offset")
    start, leading, stride = (((descriptors >> shift & 0x3FFF) << 4)[:, None, None] for shift in (0, 16, 32))
    modes = np.unique(descriptors >> 62 & 3)
    if len(modes) != 1:
        raise Unsupported("matrix descriptors of several swizzles")
    wide = WIDTH_OF_SWIZZLE[int(modes[0])]
    mn, k = np.arange(rows)[:, None], np.arange(DEPTH)[None, :]
    if not transposed:
        within = mn % 8 * (16 * wide) + mn // 8 * stride
        at = within + (k // 8 * leading + k % 8 * 2 if wide == 1 else k * 2)
    elif wide == 1:
        at = mn // 8 * stride + k // 8 * leading + k % 8 * 16 + mn % 8 * 2
    else:
        unit = mn // 8
        at = unit % wide * 16 + unit // wide * leading + k % 8 * (16 * wide) + k // 8 * stride + mn % 8 * 2
    at = at + start
    return at ^ (at >> 7 & wide - 1) << 4


@dataclass
class Factor:
    """A factor in shared memory, by a descriptor."""

    machine: Machine
    access: Access
    descriptor: Value
    rows: int
    transposed: bool
    kind: str

    def read(self, groups: Array) -> Array:
        """[groups, rows, 16] as float32, of TF32 [groups, rows, 8]."""
        machine, lanes = self.machine, groups * GROUP
        descriptors = np.broadcast_to(self.descriptor, machine.lanes)[lanes]
        try:
            at = described(descriptors, self.rows, self.transposed)
        except Unsupported as error:
            i = self.access.instruction
            raise Unsupported(f"{error} in `{i.text}` at {machine.body.where(i.line)}") from None
        outside = (at + 2 > machine.shared.size).reshape(len(groups), -1).any(1)
        if outside.any():
            detail = "a matrix descriptor leads out of shared memory"
            machine.fault("out of bounds", self.access.instruction, lanes[outside], detail)
            at = np.minimum(at, machine.shared.size - 2)
        places = at + machine.shared_base[lanes][:, None, None]
        if machine.watch:
            for lane, lane_places in zip(lanes, places, strict=True):
                self._note(np.unique(lane_places >> 4) << 4, int(lane))
        return numbers(machine.shared.words[2].take(places >> 1), self.kind)

    def _note(self, places: Array, lane: int) -> None:
        stamps = np.full(len(places), self.machine.stamps[lane])
        self.machine.checks.watch_shared(self.access, places, stamps, np.full(len(places), lane))


def _in_registers(machine: Machine, sources: list[Value], kind: str, groups: Array) -> Array:
    """The left factor [groups, 64, 16], of TF32 [groups, 64, 8]: each warp has 16 rows, as in mma."""
    bits = np.empty((len(groups), 4, 2, 8, 2, 4), np.uint32)
    for n, source in enumerate(sources):
        bits[:, :, n % 2, :, n // 2] = np.broadcast_to(source, machine.lanes).reshape(-1, 4, 8, 4)[groups]
    return numbers(bits.reshape(-1, 64, 8), kind)


SHAPES = " ".join(f"m64n{n}k{k}" for n in range(8, 257, 8) for k in (8, 16))


@makes("wgmma", f"fence commit_group wait_group mma_async sync aligned f32 bf16 f16 tf32 {SHAPES}")
def warpgroup(machine: Machine, i: Instruction) -> Step:
    """mma_async: d = a b + d if the predicate holds, else a b; the factors may be negated."""
    if i.mods[0] != "mma_async":
        return NO_STEP
    (_, columns, depth), kind = map(int, re.findall(r"\d+", i.mods[3])), i.mods[5]
    fits = depth == (8 if kind == "tf32" else 16)
    if i.mods[4] != "f32" or kind == "f32" or i.mods[6] != kind or not fits:
        raise Unsupported(f"a product of {i.mods[4:]}")
    registers = machine.registers
    sums = [registers.target(name, "f32") for name in i.args[0]]
    if len(sums) != columns // 2:
        raise Unsupported(f"{columns} columns in {len(sums)} registers")
    keep = registers.source(i.args[3], "pred")
    signs = [registers.number(arg) for arg in i.args[4:6]]
    major = [bool(registers.number(arg)) for arg in i.args[6:]] or [False, False]  # TF32 is K-major
    right = _factor(machine, i, i.args[2], columns, major[-1])
    if isinstance(i.args[1], list):
        words = [registers.source(name, "u32") for name in i.args[1]]
        left: Any = partial(_in_registers, machine, words, kind)
    else:
        left = _factor(machine, i, i.args[1], 64, major[0])
    sign = np.float32((signs[0] or 0) * (signs[1] or 0))

    def run(active: Active | None) -> None:
        active_groups = find_groups(machine, active, i, GROUP)
        groups = np.arange(machine.lanes // GROUP) if active_groups is None else active_groups
        product = np.matmul(left(groups), right(groups).swapaxes(1, 2)) * sign
        _add(machine, sums, keep, groups, product.reshape(len(groups), 4, 2, 8, columns // 8, 4, 2))

    return by_lanes(run)


def _factor(machine: Machine, i: Instruction, name: Any, rows: int, transposed: bool) -> Any:
    access = Access(i, "shared", 16, together=True)
    return Factor(machine, access, machine.registers.source(name, "s64"), rows, transposed, i.mods[5]).read


def _add(machine: Machine, sums: list[Array | None], keep: Value, groups: Array, product: Array) -> None:
    """Adds products to the sums: 8 columns are 4 registers, as in mma."""
    mask = np.broadcast_to(keep, machine.lanes).reshape(-1, 4, 8, 4)[groups]
    for n, register in enumerate(sums):
        if register is not None:
            rows = register.reshape(-1, 4, 8, 4)
            new = product[:, :, n % 4 // 2, :, n // 4, :, n % 2]
            rows[groups] = np.where(mask, new + rows[groups], new)
