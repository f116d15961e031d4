"""Kernels with one instruction changed, to see whether tests notice: of each instruction what makes sense."""

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from typing import NamedTuple

from .body import Address, Body, Instruction
from .parse import Kernel
from .types import SIZES, type_of

KINDS = {
    "barrier": "a barrier of a block is taken away",
    "warp barrier": "a barrier of a warp is taken away",
    "wait": "the end of a group of copies, or a wait for them, is taken away",
    "factor": "the upper and lower rows of a matrix product's left factor are exchanged",
    "predicate": "what runs under a predicate runs where it is false",
    "operands": "the operands of a difference, quotient, remainder, order or choice are exchanged",
    "address": "an access to shared or global memory is moved by its own size",
}
EXCHANGED = {"sub", "div", "rem", "selp"}
SYMMETRIC = {"eq", "ne", "equ", "neu", "num", "nan"}


class Mutant(NamedTuple):
    """`changed` stands in place of instruction `number` of a kernel's basic block `block`."""

    kind: str
    block: int
    number: int
    changed: Instruction


def mutants_of(body: Body) -> Iterator[Mutant]:
    """All of them, in the order of the text."""
    for block in body.blocks:
        for number, instruction in enumerate(block.instructions):
            for kind, changed in _changes(instruction):
                yield Mutant(kind, block.number, number, changed)


def mutated(kernel: Kernel, mutant: Mutant) -> Kernel:
    """The kernel with this change; it shares everything else with the one that it is made of."""
    body = copy(kernel.parsed)
    block = copy(body.blocks[mutant.block])
    block.instructions = list(block.instructions)
    block.instructions[mutant.number] = mutant.changed
    body.blocks = [block if other.number == block.number else other for other in body.blocks]
    body.meetings = {b.number for b in body.blocks if any(i.is_meeting for i in b.instructions)}
    changed = copy(kernel)
    changed.parsed = body
    return changed


def narrowest_access(body: Body) -> int:
    """Of those to shared and global memory, in bytes a thread and element."""
    instructions = (i for block in body.blocks for i in block.instructions)
    return min(int(SIZES[type_of(i.mods)]) for i in instructions if i.op in ("ld", "st") and "param" not in i.mods)


def _changes(i: Instruction) -> Iterator[tuple[str, Instruction]]:
    if removed := _removed(i):
        # A fence does nothing here, and a block of instructions can't be empty.
        yield removed, Instruction("fence", (), [], None, False, f"nothing for {i.text}", i.line, callers=i.callers)
    if i.guard:
        yield "predicate", replace(i, unless=not i.unless)
    if i.op == "mma" and isinstance(i.args[1], list):
        upper, lower, *right = i.args[1]
        yield "factor", replace(i, args=[i.args[0], [lower, upper, *reversed(right)], *i.args[2:]])
    ordered = i.op in EXCHANGED or (i.op == "setp" and SYMMETRIC.isdisjoint(i.mods))
    if ordered and i.args[1] != i.args[2]:
        yield "operands", replace(i, args=[i.args[0], i.args[2], i.args[1], *i.args[3:]])
    for number, arg in enumerate(i.args):
        if isinstance(arg, Address) and "param" not in i.mods:
            moved: list[str | list[str] | Address] = list(i.args)
            moved[number] = Address(arg.base, arg.offset + _size(i))
            yield "address", replace(i, args=moved)


def _removed(i: Instruction) -> str | None:
    """The kind of a mutant that lacks this instruction, if there is one."""
    if i.op == "bar":
        return "warp barrier" if "warp" in i.mods else "barrier"
    return "wait" if i.op == "cp" and not any(isinstance(arg, Address) for arg in i.args) else None


def _size(i: Instruction) -> int:
    """Of an access, in bytes a thread."""
    if i.op in ("ldmatrix", "stmatrix"):
        return 16
    if i.op == "cp":
        return int(str(i.args[2]), 0)
    vector = next((int(mod[1]) for mod in i.mods if mod in ("v2", "v4")), 1)
    return int(SIZES[type_of(i.mods)]) * vector
