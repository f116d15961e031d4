"""The commands and snippets of a Markdown page, and what its comments say about running them.

A comment above a fence that begins with `run:` tells how its block is run:

    <!-- run: no, needs a GPU -->                 not at all, for one of `REASONS`
    <!-- run: parse, takes hours -->              its commands are only checked by the command lines' own parsers
    <!-- run: with 'steps=3' for 'steps=3000' --> with another text in the place of what stands there
    <!-- run: before
    evaclip data emoji data/emoji
    -->                                           these lines first, in the block's language

`no 'TEXT', REASON` and `parse 'TEXT', REASON` say it of the shell lines that hold TEXT. Several comments may stand
above one fence. What has no comment is run.
"""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

REASONS = (
    "changes the environment", "downloads weights", "needs a container engine", "needs AMX", "needs a GPU",
    "needs data", "needs several processes", "needs the network", "never ends", "takes hours", "takes minutes",
)  # fmt: skip
SHELL = ("bash", "console")
LANGUAGES = (*SHELL, "python", "yaml", "text")

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^`]*$")
_COMMENT = re.compile(r"<!--\s*run:(.*?)-->", re.DOTALL)
_ANY_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_VERDICT = re.compile(r"(?P<verdict>no|parse)(?:\s+'(?P<text>[^']+)')?,\s*(?P<reason>.+)")
_REPLACEMENT = re.compile(r"with\s+'(?P<new>[^']*)'\s+for\s+'(?P<old>[^']+)'")
_FENCED = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`((?:evaclip|python -m benchmarks) [^`]+)`")


class MarkError(ValueError):
    """A fence without a known language, or a comment above one that says nothing known."""


@dataclass(frozen=True)
class Mark:
    """What a comment says of a block's lines, or of those that hold `text`."""

    verdict: str
    reason: str
    text: str = ""


@dataclass
class Block:
    """A fenced block: where it stands, what it holds, what its comments say."""

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
        """Each command of a shell block, continued lines joined, with the mark that holds for it."""
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
                continue  # what a command printed
            line = line[2:]
        while line.endswith("\\"):
            line = line[:-1].rstrip() + " " + next(lines).strip()
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


def read_blocks(path: Path, page: Path | None = None) -> list[Block]:
    """All fenced blocks of a page.

    Raises:
        MarkError: a fence has no language or an unknown one, or a comment isn't understood or stands above no fence.
    """
    page = page or path
    blocks: list[Block] = []
    comments: list[str] = []
    lines = iter(enumerate(path.read_text(encoding="utf-8").splitlines(), start=1))
    for number, line in lines:
        if line.lstrip().startswith("<!--"):
            comment = line
            while "-->" not in comment:
                comment += "\n" + next(lines)[1]
            comments += _COMMENT.findall(comment)
        elif fence := _FENCE.match(line):
            body = []
            for _, inner in lines:
                if inner.strip() == "```":
                    break
                body.append(inner.removeprefix(fence["indent"]))
            block = Block(page, number, fence["language"], "\n".join(body) + "\n")
            blocks.append(_marked(block, comments))
            comments = []
        elif line.strip() and comments:
            raise MarkError(f"{page}:{number}: a 'run:' comment must stand right above a fence")
    return blocks


def _marked(block: Block, comments: list[str]) -> Block:
    if block.language not in LANGUAGES:
        raise MarkError(f"{block.place}: language {block.language!r}; known are {', '.join(LANGUAGES)}")
    for comment in map(str.strip, comments):
        if replacement := _REPLACEMENT.fullmatch(comment):
            if replacement["old"] not in block.code:
                raise MarkError(f"{block.place}: nothing to replace: {replacement['old']!r} isn't there")
            block.code = block.code.replace(replacement["old"], replacement["new"])
        elif verdict := _VERDICT.fullmatch(comment):
            if verdict["reason"] not in REASONS:
                raise MarkError(f"{block.place}: reason {verdict['reason']!r}; known are {', '.join(REASONS)}")
            if (text := verdict["text"] or "") not in block.code:
                raise MarkError(f"{block.place}: {text!r} isn't there")
            block.marks.append(Mark(verdict["verdict"], verdict["reason"], text))
        elif comment.startswith("before\n"):
            block.before = textwrap.dedent(comment.removeprefix("before\n")) + "\n"
        else:
            raise MarkError(f"{block.place}: 'run: {comment}' isn't understood")
    return block


def read_spans(path: Path) -> list[str]:
    """The commands of this project in a page's running text; those with `...` in them are no whole commands."""
    text = _ANY_COMMENT.sub("", _FENCED.sub("", path.read_text("utf-8")))
    return [span for found in _SPAN.findall(text) if "..." not in (span := " ".join(found.split()))]
