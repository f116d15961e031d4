"""The commands and snippets of a Markdown page, and how `marks.toml` wants them run.

A block without a mark is run. Each mark in `marks.toml` belongs to a page and has these keys:

    at       text of one block of the page, which no other block contains
    no       don't run the block, for one of `REASONS`
    parse    check the block's commands with their own parsers only, for one of `REASONS`
    lines    `no` or `parse` holds only for shell lines with one of these texts
    with     replaces texts of the block: { "steps=3000" = "steps=3" }
    before   code in the block's language that runs first
"""

import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REASONS = (
    "changes the environment", "downloads weights", "needs a container engine", "needs AMX", "needs a GPU",
    "needs data", "needs several processes", "needs the network", "never ends", "takes hours", "takes minutes",
)  # fmt: skip
SHELL = ("bash", "console")
LANGUAGES = (*SHELL, "python", "yaml", "text")
KEYS = ("at", "no", "parse", "lines", "with", "before")
MARKS: dict[str, list[dict[str, Any]]] = tomllib.loads(Path(__file__).with_name("marks.toml").read_text("utf-8"))

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^`]*$")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_FENCED = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`((?:evaclip|python -m benchmarks) [^`]+)`")


class MarkError(ValueError):
    """A fence has no known language, or a mark is wrong."""


@dataclass(frozen=True)
class Mark:
    """Verdict on a block's lines, or only on lines that contain `text`."""

    verdict: str
    reason: str
    text: str = ""


@dataclass
class Block:
    """A fenced block with its marks."""

    page: Path
    line: int
    language: str
    code: str
    marks: list[Mark] = field(default_factory=list)
    before: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> Iterator[tuple[str, Mark | None]]:
        """Each command of a shell block with its mark; continued lines are joined."""
        for command in _commands(self.code, prompts=self.language == "console"):
            yield command, self.mark_of(command)

    def mark_of(self, text: str) -> Mark | None:
        """The first mark that names a part of this text, else that of the whole block."""
        named = [mark for mark in self.marks if mark.text and mark.text in text]
        return next(iter([*named, *(mark for mark in self.marks if not mark.text)]), None)


def _commands(code: str, prompts: bool) -> Iterator[str]:
    lines = iter(code.splitlines())
    for line in lines:
        if prompts:
            if not line.startswith("$ "):
                continue  # output of a command
            line = line[2:]
        while line.endswith("\\"):
            line = line[:-1].rstrip() + " " + next(lines).strip()
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


def read_blocks(path: Path, page: Path | None = None, marks: Sequence[dict[str, Any]] = ()) -> list[Block]:
    """All fenced blocks of a page.

    Raises:
        MarkError: a fence has no language or an unknown one, or a mark has an unknown key or reason, or doesn't match.
    """
    blocks = []
    lines = iter(enumerate(path.read_text(encoding="utf-8").splitlines(), start=1))
    for number, line in lines:
        if fence := _FENCE.match(line):
            body = []
            for _, inner in lines:
                if inner.strip() == "```":
                    break
                body.append(inner.removeprefix(fence["indent"]))
            block = Block(page or path, number, fence["language"], "\n".join(body) + "\n")
            if block.language not in LANGUAGES:
                raise MarkError(f"{block.place}: language {block.language!r}; known are {', '.join(LANGUAGES)}")
            blocks.append(block)
    matches = [[block for block in blocks if mark["at"] in block.code] for mark in marks]
    for mark, matching in zip(marks, matches, strict=True):
        if len(matching) != 1:
            raise MarkError(f"{page or path}: {mark['at']!r} must be in one block, got {len(matching)} blocks")
        _apply(mark, *matching)
    return blocks


def _apply(mark: dict[str, Any], block: Block) -> None:
    if unknown := set(mark) - set(KEYS):
        raise MarkError(f"{block.place}: keys of a mark must be of {', '.join(KEYS)}, got {', '.join(unknown)}")
    for old, new in mark.get("with", {}).items():
        if old not in block.code:
            raise MarkError(f"{block.place}: no text {old!r} to replace")
        block.code = block.code.replace(old, new)
    for verdict in ("no", "parse"):
        if reason := mark.get(verdict):
            if reason not in REASONS:
                raise MarkError(f"{block.place}: reason must be one of {', '.join(REASONS)}, got {reason!r}")
            for text in mark.get("lines", [""]):
                if text not in block.code:
                    raise MarkError(f"{block.place}: no line with {text!r}")
                block.marks.append(Mark(verdict, reason, text))
    block.before += mark.get("before", "")


def read_spans(path: Path) -> list[str]:
    """This project's commands in a page's running text; incomplete commands contain `...` and are left out."""
    text = _COMMENT.sub("", _FENCED.sub("", path.read_text("utf-8")))
    return [span for found in _SPAN.findall(text) if "..." not in (span := " ".join(found.split()))]
