"""The report of a launch: faults, counts of instructions, and traffic."""

from collections import Counter
from dataclasses import dataclass, field

from .parse import Kernel
from .registers import Dim3
from .traffic import Sectors, Traffic

UNEQUAL = "another thread writes something else there in the same instruction"
NEARLY_EQUAL = "another thread writes nearly the same there in the same instruction"
"""The detail of a race that may be of no consequence: of copies of a sum that were rounded differently."""

POISONED = "what it stores depends on lanes that a load masked off; give the load `other`"


@dataclass
class Fault:
    """A forbidden access or operation of a kernel.

    Faults of one kind at one instruction are one `Fault`: the first, with its block and thread, and their number.
    NEARLY_EQUAL counts as a separate kind.
    """

    kind: str
    instruction: str
    where: str
    detail: str
    block: int
    thread: int
    count: int = 1

    def __str__(self) -> str:
        who = f"thread {self.thread} of block {self.block}"
        return f"{self.kind} at {self.where}, `{self.instruction}`, {who}: {self.detail} ({self.count} in all)"


class Faults(Exception):
    """Raised at the end of a launch that had some; `faults` holds them."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = faults


TrafficKey = tuple[str, str, str]
"""Space ("global", "global store", "shared", "shared store"), place in the source, instruction."""


@dataclass
class Report:
    """The report of a launch.

    `blocks`: how many threads ran each basic block. If it was counted, `warps`: how many warps did, `traffic`: by
    space, place and instruction, `loads` and `stores`: which sectors of global memory.
    """

    kernel: str
    entry: Kernel
    grid: Dim3
    block: Dim3
    dynamic_shared: int
    faults: list[Fault] = field(default_factory=list)
    traffic: dict[TrafficKey, Traffic] = field(default_factory=dict)
    blocks: Counter[int] = field(default_factory=Counter)
    warps: Counter[int] = field(default_factory=Counter)
    loads: Sectors = field(default_factory=Sectors)
    stores: Sectors = field(default_factory=Sectors)

    def lines(self) -> Counter[tuple[str, int]]:
        """Instructions times threads of each line of the source, by file and line; 0 where none was run."""
        counts: Counter[tuple[str, int]] = Counter()
        for block in self.entry.parsed.blocks:
            for instruction in block.instructions:
                file, line = instruction.line
                counts[self.entry.module.files.get(file, "PTX"), line] += self.blocks[block.number]
        return counts

    def total(self, space: str) -> Traffic:
        """Traffic of all instructions of a space; "global" and "shared" are loads and stores together."""
        total = Traffic()
        for (where, *_), traffic in self.traffic.items():
            if where.startswith(space):
                total.add(traffic)
        return total
