"""The body of a kernel: instructions in basic blocks, the names it declares, and which registers outlive a block."""

import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from .types import SIZES, WARP, Unsupported

ENDS = {"bra", "ret", "exit", "trap", "bar"}
"""Opcodes that end a basic block; a barrier does if it is one of a whole block of threads."""
WRITES_NOTHING = {"st", "red", "bra", "bar", "cp", "stmatrix", "ret", "exit", "trap", "fence", "membar", "wgmma"}

_LABEL = re.compile(r"([\w$]+)\s*:(?!:)\s*")
_VARIABLE = re.compile(r"\.(\w+)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?")
_COUNTED = re.compile(r"(%\w+?)<(\d+)>")
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]")
_IGNORED = re.compile(r"\.(pragma|section|file|loc|branchtargets|param)\b")
ENDS_LAUNCH = ("__assertfail", "fail_launch")
"""Parts of the names of functions that don't return; no others are called."""


class Address(NamedTuple):
    """[base + offset]"""

    base: str
    offset: int


Operand = str | list[str] | Address
Places = tuple[tuple[int, int], ...]
"""Numbers of files and lines."""


class Variable(NamedTuple):
    """A variable in shared memory; size 0 means that the launch sets it."""

    name: str
    size: int
    align: int


@dataclass(slots=True)
class Instruction:
    """One statement, such as `@!%p1 ld.global.v2.f32 {%f1, %f2}, [%rd1+8];`.

    `line` is file number and line of the source if `.loc` names them, else 0 and the line of the PTX; `callers` the
    same of the inlined calls, the last one first. `number`: the line of the PTX.
    """

    op: str
    mods: tuple[str, ...]
    args: list[Operand]
    guard: str | None
    unless: bool
    text: str
    line: tuple[int, int]
    writes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    callers: Places = ()
    number: int = 0

    @property
    def ends_block(self) -> bool:
        return self.op in ENDS and "warp" not in self.mods

    @property
    def is_meeting(self) -> bool:
        """Whether it waits for other lanes of the warp."""
        return not self.ends_block and ("sync" in self.mods or self.op == "wgmma")


@dataclass(slots=True)
class Block:
    """A basic block, and the numbers of its successors: the target of a branch comes first."""

    number: int
    instructions: list[Instruction] = field(default_factory=list)
    following: list[int] = field(default_factory=list)


class Body:
    """The text between the braces of a kernel.

    Attributes:
        blocks: in the order of the text.
        shared: variables in shared memory.
        lasting: registers that a block reads and another one has written, for which idle lanes must be left alone.
        meetings: numbers of the blocks in which lanes of a warp wait for each other; `meeting_size` lanes do.
        constants: the text and type of the number that a register holds throughout, by register.
    """

    def __init__(self, text: str, first_line: int, files: dict[int, str]) -> None:
        self.files = files
        self.shared: list[Variable] = []
        self.blocks = [Block(0)]
        self._types: dict[str, str] = {}
        self._counted: dict[str, str] = {}
        self._labels: dict[str, int] = {}
        for statement, line, self._callers, self._number in _statements(text, first_line):
            self._read(statement, line)
        if not self.blocks[-1].instructions:
            line = self.blocks[-2].instructions[-1].line if len(self.blocks) > 1 else (0, first_line)
            self.blocks[-1].instructions.append(Instruction("ret", (), [], None, False, "ret", line))
        for block in self.blocks:
            block.following = self._following(block)
        self.lasting = _lasting(self.blocks)
        self.constants = _constants(self.blocks)
        self.meetings = {b.number for b in self.blocks if any(i.is_meeting for i in b.instructions)}
        grouped = any(i.op == "wgmma" for b in self.blocks for i in b.instructions)
        self.meeting_size = 4 * WARP if grouped else WARP

    def _read(self, statement: str, line: tuple[int, int]) -> None:
        while ":" in statement and (match := _LABEL.match(statement)):
            self._begin_block()
            self._labels[match[1]] = len(self.blocks) - 1
            statement = statement[match.end() :]
        if statement.startswith("."):
            self._declare(statement, line)
        elif statement and not statement.startswith("st.param"):  # of a call
            instruction = self._instruction(statement, line)
            self.blocks[-1].instructions.append(instruction)
            if instruction.ends_block:
                self._begin_block()

    def _begin_block(self) -> None:
        if self.blocks[-1].instructions:
            self.blocks.append(Block(len(self.blocks)))

    def _declare(self, statement: str, line: tuple[int, int]) -> None:
        kind, _, rest = statement.partition(" ")
        if kind == ".reg":
            type_name, _, names = rest.strip().partition(" ")
            for name in names.split(","):
                counted = _COUNTED.fullmatch(name.strip())
                where, key = (self._counted, counted[1]) if counted else (self._types, name.strip())
                where[key] = type_name.strip(".")
        elif (match := _VARIABLE.match(statement)) and match[1] == "shared":
            self.shared.append(variable(match))
        elif not _IGNORED.match(statement):
            raise Unsupported(f"{statement!r} at {self.where(line)}")

    def where(self, line: tuple[int, int]) -> str:
        """File and line, as in messages."""
        return f"{self.files.get(line[0], 'PTX').rpartition('/')[2]}:{line[1]}"

    def register_type(self, name: str) -> str | None:
        """The type that a register was declared with; None if this is no register."""
        name_type = self._types.get(name)
        if name_type is None and (name_type := self._counted.get(name.rstrip("0123456789"))):
            self._types[name] = name_type
        return name_type

    def _instruction(self, statement: str, line: tuple[int, int]) -> Instruction:
        guard, unless, text = None, False, statement
        if text[0] == "@":
            word, _, text = text.partition(" ")
            guard, unless = word.lstrip("@!"), "!" in word
        opcode, _, rest = text.strip().partition(" ")
        op, mods = _opcode(opcode)
        if op == "call":
            return self._call(statement, guard, unless, line)
        try:
            args = [_operand(part) for part in _split(rest)]
        except Unsupported as error:
            raise Unsupported(f"{error} in {statement!r} at {self.where(line)}") from None
        made = Instruction(op, mods, args, guard, unless, statement, line, callers=self._callers, number=self._number)
        written: list[str] = []
        read: list[str] = [guard] if guard else []
        for number, arg in enumerate(args):
            target = number == 0 and op not in WRITES_NOTHING and not isinstance(arg, Address)
            for name in _names(arg):
                if self.register_type(name):
                    (written if target else read).append(name)
        if mods[:1] == ("mma_async",):  # adds to its sums
            written += [name for name in _names(args[0]) if self.register_type(name)]
        made.writes, made.reads = tuple(written), tuple(read)
        return made

    def _call(self, statement: str, guard: str | None, unless: bool, line: tuple[int, int]) -> Instruction:
        if not any(name in statement for name in ENDS_LAUNCH):
            raise Unsupported(f"{statement!r} at {self.where(line)}: functions are called to end a launch only")
        return Instruction("trap", (), [], guard, unless, statement, line, reads=(guard,) if guard else ())

    def _following(self, block: Block) -> list[int]:
        last, after = block.instructions[-1], block.number + 1
        if last.op == "bra":
            label = str(last.args[0])
            if label not in self._labels:
                raise Unsupported(f"a branch to {label} at {self.where(last.line)}")
            return [self._labels[label], after] if last.guard else [self._labels[label]]
        if last.op in ("ret", "exit", "trap"):
            return [after] if last.guard else []
        return [after]


def variable(match: re.Match[str]) -> Variable:
    """The variable in a match of `.shared .align 16 .b8 name[64]`; without a number in the brackets its size is 0."""
    count = 1 if match[5] is None else int(match[5] or 0)
    return Variable(match[4], SIZES[match[3]] * count, int(match[2] or SIZES[match[3]]))


def module_variables(text: str) -> list[Variable]:
    """Variables in shared memory that are declared before all kernels."""
    return [variable(match) for match in _VARIABLE.finditer(text) if match[1] == "shared"]


def _statements(text: str, first_line: int) -> Iterator[tuple[str, tuple[int, int], Places, int]]:
    """Statements without semicolons, with single spaces, the lines of the source that they stand for, those of their
    callers, and their own."""
    place, pending = (0, 0), ""
    callers: Places = ()
    callers_by_place: dict[tuple[str, ...], Places] = {}
    places = -1  # within inline assembly, where LLVM counts lines up from the first place
    for number, raw in enumerate(text.split("\n"), first_line):
        line, _, comment = (part.strip() for part in raw.partition("//"))
        if comment in ("begin inline asm", "end inline asm"):
            places = 0 if comment[0] == "b" else -1
        if not line:
            continue
        if line.startswith((".loc ", ".loc\t")):
            places += places >= 0
            if places > 1:
                continue
            words = line.replace(",", " ").split()
            if int(words[2]):
                place = (int(words[1]), int(words[2]))
                callers = ()
                if words[-4] == "inlined_at":  # an earlier .loc says where that is inlined
                    at = tuple(words[-3:])
                    callers = ((int(at[0]), int(at[1])), *callers_by_place.get(at, ()))
                callers_by_place[tuple(words[1:4])] = callers
            continue
        where = place if place[0] else (0, number)
        *complete, rest = (pending + line).split(";")
        for statement in complete:
            yield _bare(statement), where, callers, number
        pending = ""
        if rest and (rest := _bare(rest)):
            if rest.endswith(":"):
                yield rest, where, callers, number
            elif not _IGNORED.match(rest):
                pending = rest + " "


def _bare(statement: str) -> str:
    """Without the braces of a scope, which stand in front of or behind a statement."""
    statement = " ".join(statement.split())
    while statement[:1] in ("{", "}"):
        statement = statement[1:].lstrip()
    return statement


def _names(arg: Operand) -> list[str]:
    if isinstance(arg, Address):
        return [arg.base]
    return arg if isinstance(arg, list) else arg.lstrip("!").split("|")


@cache
def _opcode(name: str) -> tuple[str, tuple[str, ...]]:
    op, *mods = name.replace("shared::cta", "shared").split(".")
    return op, tuple(mods)


def _split(text: str) -> list[str]:
    """At the commas outside braces."""
    text = text.strip()
    if "{" not in text:
        return [part.strip() for part in text.split(",")] if text else []
    return [part for part in re.split(r"\s*,\s*(?![^{]*\})", text) if part]


@cache
def _operand(text: str) -> Operand:
    if text[0] == "{":
        return [part.strip() for part in text[1:-1].split(",")]
    if text[0] == "[":
        match = _ADDRESS.fullmatch(text)
        if match is None:
            raise Unsupported(f"the address {text}")
        return Address(match[1], int(match[2] or "0", 0))
    return text


@cache
def immediate(text: str) -> int | float:
    """The number that stands in the text: 3, 0x1F, 0f3F800000, 0d3FF0000000000000, 1.5."""
    if text[:2] in ("0f", "0F"):
        return float(struct.unpack(">f", bytes.fromhex(text[2:]))[0])
    if text[:2] in ("0d", "0D"):
        return float(struct.unpack(">d", bytes.fromhex(text[2:]))[0])
    if "." in text:
        return float(text)
    return int(text.rstrip("U"), 0)


def _lasting(blocks: list[Block]) -> set[str]:
    """Registers that outlive a block, by liveness analysis; sets are the bits of integers."""
    bits: dict[str, int] = {}
    used, killed = [], []
    for block in blocks:
        use = kill = 0
        for instruction in block.instructions:
            for name in instruction.reads:
                use |= bits.setdefault(name, 1 << len(bits)) & ~kill
            for name in instruction.writes:
                bit = bits.setdefault(name, 1 << len(bits))
                if not instruction.guard:  # else other lanes keep what they have
                    kill |= bit
        used.append(use)
        killed.append(kill)
    live, changed = list(used), True
    while changed:
        changed = False
        for block in reversed(blocks):
            out = 0
            for following in block.following:
                out |= live[following] if following < len(live) else 0
            now = used[block.number] | (out & ~killed[block.number])
            changed |= now != live[block.number]
            live[block.number] = now
    anywhere = 0
    for each in live:
        anywhere |= each
    return {name for name, bit in bits.items() if anywhere & bit}


def _constants(blocks: list[Block]) -> dict[str, tuple[str, str]]:
    """Registers that are written once, and that with a number."""
    writes: Counter[str] = Counter()
    moved = {}
    for block in blocks:
        for i in block.instructions:
            writes.update(i.writes)
            value = str(i.args[1]) if i.op == "mov" and not i.guard and i.mods != ("pred",) else "_"
            if value[0] in "-0123456789":
                moved[str(i.args[0])] = (value, i.mods[-1])
    return {name: moved[name] for name, times in writes.items() if times == 1 and name in moved}
