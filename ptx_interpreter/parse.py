"""PTX text to modules and kernels; the bodies of kernels are read when they are first run."""

import re
from functools import cached_property
from typing import NamedTuple

from .body import Body, module_variables
from .types import SIZES

_ENTRY = re.compile(r"^[^\n/]*\.entry\s+([\w$]+)\s*\(", re.MULTILINE)
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.MULTILINE)
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)(?:\s+\.\w+(?:\s+\d+)?)*\s+(?P<name>[\w$%]+)\s*(?:\[(?P<count>\d+)\])?"
)


class Param(NamedTuple):
    """Of a kernel; offset and size in bytes."""

    name: str
    offset: int
    size: int


class Kernel:
    """An entry of a module.

    `params` and `param_bytes` say how arguments are packed; `most_threads` is what the text allows a block, by
    dimension, or None.
    """

    def __init__(self, name: str, header: str, body: str, first_line: int, module: "Module") -> None:
        self.name, self.module = name, module
        self.header, self.body, self.first_line = header, body, first_line
        self.params: list[Param] = []
        end = 0
        for match in _PARAM.finditer(header):
            size = SIZES[match["type"]] * int(match["count"] or 1)
            align = int(match["align"] or SIZES[match["type"]])
            offset = -(-end // align) * align
            self.params.append(Param(match["name"], offset, size))
            end = offset + size
        self.param_bytes = end
        sizes = re.search(r"\.(?:reqntid|maxntid)\s+([\d, ]+)", header)
        self.most_threads = [int(n) for n in sizes[1].split(",")] if sizes else None

    @cached_property
    def parsed(self) -> Body:
        return Body(self.body, self.first_line, self.module.files)

    def with_body(self, body: str) -> "Kernel":
        """The same kernel with other instructions, in which a fault may have been planted."""
        return Kernel(self.name, self.header, body, self.first_line, self.module)


class Module:
    """What a compiler wrote.

    Attributes:
        kernels: by name.
        target: "sm_90a".
        files: names of source files by number, as `.loc` refers to them.
        shared: variables in shared memory that stand outside kernels.
    """

    def __init__(self, text: str) -> None:
        self.files = {int(number): name for number, name in _FILE.findall(text)}
        target = re.search(r"^\.target\s+(\w+)", text, re.MULTILINE)
        self.target = target[1] if target else ""
        self.kernels: dict[str, Kernel] = {}
        starts = list(_ENTRY.finditer(text))
        ends = [start.start() for start in starts[1:]] + [len(text)]
        self.shared = module_variables(text[: starts[0].start()] if starts else text)
        for start, end in zip(starts, ends, strict=True):
            brace = text.index("{", start.end())
            body = text[brace + 1 : _closing(text, brace, end)]  # debug information may follow
            first_line = text.count("\n", 0, brace) + 1
            self.kernels[start[1]] = Kernel(start[1], text[start.start() : brace], body, first_line, self)


def _closing(text: str, brace: int, end: int) -> int:
    """Where the block ends that begins at `brace`. Blocks within may end at the beginning of a line too: what a fat
    binary holds isn't indented."""
    depth = 0
    for match in re.compile("[{}]").finditer(text, brace, end):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    return end
