"""PTX text to modules and kernels; the bodies of kernels are read when they are first run."""

import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from .body import Body, module_variables
from .types import SIZES

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
_TEXT = re.compile(r"\.global\s+\.align 1 \.b8 ([\w$]+)\[\d+\] = \{([\d, ]+)\}")
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)(?:\s+\.\w+(?:\s+\d+)?)*\s+(?P<name>[\w$%]+)\s*(?:\[(?P<count>\d+)\])?"
)


class Param(NamedTuple):
    """A parameter of a kernel; offset and size in bytes."""

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
        return Body(_without_rest(self.body), self.first_line, self.module.files)


class Module:
    """The PTX of a compiler.

    Attributes:
        kernels: by name.
        files: names of source files by number, as `.loc` refers to them.
        shared: variables in shared memory that stand outside kernels.
        texts: constants in global memory by name: what a kernel says that ends the launch.
    """

    def __init__(self, text: str) -> None:
        self.files = {int(match[1]): match[2] for match in _matches(_FILE, ".file", text)}
        self.kernels: dict[str, Kernel] = {}
        entries = list(_matches(_ENTRY, ".entry", text))
        starts = [text.rfind("\n", 0, entry.start()) + 1 for entry in entries]
        self.shared = module_variables(text[: starts[0]] if starts else text)
        self.texts = {
            match[1]: bytes(map(int, match[2].split(","))).decode() for match in _matches(_TEXT, ".global", text)
        }
        line, counted = 1, 0
        for entry, start, end in zip(entries, starts, [*starts[1:], len(text)], strict=True):
            brace = text.index("{", entry.end())
            line, counted = line + text.count("\n", counted, brace), brace
            self.kernels[entry[1]] = Kernel(entry[1], text[start:brace], text[brace + 1 : end], line, self)

    def lines(self) -> set[tuple[str, int]]:
        """File and number of each line of the source with an instruction; of inlined code the line of its function."""
        bodies = (kernel.parsed for kernel in self.kernels.values())
        places = {i.line for body in bodies for block in body.blocks for i in block.instructions}
        return {(self.files[file], line) for file, line in places if file}


def _matches(pattern: re.Pattern[str], word: str, text: str) -> Iterator[re.Match[str]]:
    """Matches of a pattern that begins with this word, outside comments; a pattern alone would take far longer."""
    at = text.find(word)
    while at >= 0:
        match = pattern.match(text, at)
        if match and "//" not in text[text.rfind("\n", 0, at) + 1 : at]:
            yield match
        at = text.find(word, at + len(word))


def _without_rest(body: str) -> str:
    """Up to the brace that closes the kernel; debug information may follow.

    Blocks within it may end at the beginning of a line too: what a fat binary holds isn't indented.
    """
    depth = 1
    for match in re.finditer("[{}]", body):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return body[: match.start()]
    return body
