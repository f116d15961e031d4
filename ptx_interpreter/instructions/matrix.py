"""ldmatrix, stmatrix and mma. Products are summed in float32, in the order that numpy's matmul takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .. import rounding
from ..body import Instruction
from ..step import Active, Step, by_lanes, find_modifier, makes
from ..types import CARRIERS, DTYPES, WARP, Array, Unsupported, Value
from ..watch import Access
from .memory import bind_addresses, read_shared, write_shared
from .warp import find_groups

if TYPE_CHECKING:
    from ..machine import Machine


def matrix_rows(machine: Machine, source: Value, warps: Array | None) -> Array:
    """A register as [warps, 8, 4]: lane 4 r + c has what belongs to row r and to the pair of columns c."""
    rows = np.broadcast_to(source, machine.lanes).reshape(-1, 8, 4)
    return rows if warps is None else rows[warps]


def put_rows(target: Array | None, warps: Array | None, rows: Array) -> None:
    if target is not None:
        target.reshape(-1, 8, 4)[slice(None) if warps is None else warps] = rows


def _bringing(machine: Machine, warps: Array | None, matrices: int) -> Active | None:
    """The lanes with the addresses: lane 8 m + r has the address of row r of matrix m."""
    if warps is None and matrices == 4:
        return None
    lanes = machine.all_lanes.reshape(-1, WARP)[slice(None) if warps is None else warps]
    return Active.from_lanes(lanes[:, : 8 * matrices].reshape(-1), machine.lanes)


def _transposed(rows: Array) -> Array:
    """The transposes of matrices [..., 8, 4] of pairs of 16 bits."""
    return np.ascontiguousarray(rows.view(np.uint16).swapaxes(-1, -2)).view(np.uint32)


@makes("ldmatrix stmatrix", "sync aligned m8n8 x1 x2 x4 trans shared b16")
def move_matrices(machine: Machine, i: Instruction) -> Step:
    """Matrices of 8 rows of 16 bytes, from or to shared memory; `trans` transposes each."""
    store, number = i.op == "stmatrix", int((find_modifier(i, "x1 x2 x4") or "x1")[1])
    address, registers = (i.args[0], i.args[1]) if store else (i.args[1], i.args[0])
    names = registers if isinstance(registers, list) else [registers]
    if len(names) != number:
        raise Unsupported(f"{number} matrices in {len(names)} registers")
    bind = machine.registers.source if store else machine.registers.target
    vectors = [bind(name, "u32") for name in names]
    addresses = bind_addresses(machine, address)
    access = machine.checks.access(Access(i, "shared", 16, write=store))
    turn = _transposed if "trans" in i.mods else np.asarray

    def run(active: Active | None) -> None:
        warps = find_groups(machine, active, i)
        bringing = _bringing(machine, warps, number)
        if store:
            rows = turn(np.stack([matrix_rows(machine, source, warps) for source in vectors], axis=1))
            words = np.ascontiguousarray(rows).reshape(-1, 4).view(CARRIERS[16]).reshape(-1)
            write_shared(machine, access, bringing, addresses(bringing), words)
        else:
            words = read_shared(machine, access, bringing, addresses(bringing))
            rows = turn(words.view(np.uint32).reshape(-1, number, 8, 4))
            for n, target in enumerate(vectors):
                put_rows(target, warps, rows[:, n])

    return by_lanes(run)


def numbers(bits: Array, kind: str) -> Array:
    """float32 of elements [..., n] in 32 bits: pairs of 16 bits, the lower half first, [..., 2 n]; TF32 [..., n];
    integers of 8 bits [..., 4 n]."""
    if kind in ("s8", "u8"):
        return np.asarray(bits.view(DTYPES[kind]), np.float32)
    if kind == "tf32":
        return rounding.cut_to_tf32(bits.view(np.uint32))
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return rounding.from_bf16(bits.view(np.uint16))


SHAPES = {
    ("f32", "tf32"): "m16n8k8",
    **dict.fromkeys((("f32", "bf16"), ("f32", "f16"), ("f16", "f16")), "m16n8k16"),
    **dict.fromkeys((("s32", "s8"), ("s32", "u8")), "m16n8k32"),
}
"""Shapes of products by the types of sums and factors."""


@makes("mma", "sync aligned m16n8k32 m16n8k16 m16n8k8 row col f32 bf16 f16 tf32 satfinite s32 s8 u8")
def multiply(machine: Machine, i: Instruction) -> Step:
    """d = a b + c. In PTX's figures for m16n8k16: row or column of an element is lane / 4, its pair lane % 4.

    Register n of a (16 x 16) starts at row 8 (n % 2) and column 8 (n / 2), register n of b (16 x 8) at row 8 n;
    registers 2 n and 2 n + 1 of d and c (16 x 8) have the two columns of a pair from row 8 n. In m16n8k8 an element of
    TF32 takes the place of a pair, in m16n8k32 four integers of 8 bits do.
    """
    kinds = [mod for mod in i.mods if mod in ("f32", "bf16", "f16", "tf32", "s32", "s8", "u8")]
    kind = kinds[0]
    if kinds[3] != kind or kinds[1] != kinds[2] or SHAPES.get((kind, kinds[1])) not in i.mods:
        raise Unsupported(f"a product of {kinds} in this shape")
    d, a, b, c = i.args
    carrier = "u32" if kind == "f16" else kind  # of pairs
    targets = [machine.registers.target(name, carrier) for name in d]
    left, right = ([machine.registers.source(name, "u32") for name in names] for names in (a, b))
    start = [machine.registers.source(name, carrier) for name in c]

    def run(active: Active | None) -> None:
        warps = find_groups(machine, active, i)
        count = machine.lanes // WARP if warps is None else len(warps)
        # Four pairs of columns are next to each other.
        factor = np.empty((count, 2, 8, 2, 4), np.uint32)
        for n, register in enumerate(left):
            factor[:, n % 2, :, n // 2] = matrix_rows(machine, register, warps)
        other = np.empty((count, 8, 2, 4), np.uint32)
        for n, register in enumerate(right):
            other[:, :, n] = matrix_rows(machine, register, warps)
        # Products of integers are exact: their sums have fewer than 24 bits.
        rows = numbers(factor.reshape(count, 16, 8), kinds[1])
        columns = numbers(other.reshape(count, 8, 8), kinds[1])
        product = np.matmul(rows, columns.swapaxes(1, 2)).reshape(count, 2, 8, 4, 2)
        if kind == "s32":
            product = product.astype(np.int64)
        before = [matrix_rows(machine, register, warps) for register in start]
        if kind == "f16":
            before = [rounding.from_f16(words >> shift & 0xFFFF) for words in before for shift in (0, 16)]
        sums = [product[:, n // 2, :, :, n % 2] + before[n] for n in range(4)]
        if "satfinite" in i.mods:
            sums = [np.clip(total, -(1 << 31), (1 << 31) - 1) for total in sums]
        if kind == "f16":
            halves = [rounding.to_f16(total).astype(np.uint32) for total in sums]
            sums = [halves[n] | halves[n + 1] << 16 for n in (0, 2)]
        for target, total in zip(targets, sums, strict=True):
            put_rows(target, warps, total)

    return by_lanes(run)
