"""Runs the commands and snippets of README.md and docs/ from an installed wheel.

    python -m venv clean && clean/bin/pip install 'dist/evakernels-0.1.0-...whl[clip,demo,export]'
    python tests/docs/run_docs.py --python clean/bin/python

Every page has a scratch folder and one namespace for its Python blocks. Shell blocks run in bash. `marks.toml` lists
blocks that are only parsed or left out (see `markdown_blocks.py`). Pages that measure need the folder
`benchmarks`, which is in no wheel: each scratch folder has a link to it, and nothing else of the source tree.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markdown_blocks import MARKS, SHELL, Block, Mark, MarkError, read_blocks, read_spans

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))

from warm import environment, warm  # noqa: E402

INSIDE = Path(__file__).with_name("documented.py")
SECONDS = 300
# Several pages begin with the emoji shards: the first page draws them, and the others get a copy. A ninth of the
# pixels takes a third of the time.
DRAW_ONCE = """#!/bin/sh
PATH=${PATH#*:}
[ "$*" = "data emoji data/emoji" ] || exec evaclip "$@"
cd "${0%/*}" && flock lock sh -c '[ -e drawn ] || { evaclip "$@" --size 32 && touch drawn; }' sh "$@" || exit
mkdir -p "$OLDPWD/data" && cp -r data/emoji "$OLDPWD/data"
"""


def pages() -> list[Path]:
    """The pages that are run, relative to the repository."""
    return [path.relative_to(ROOT) for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))]


@dataclass
class Outcome:
    """Numbers of blocks and commands of a page that ran, were parsed or left out, by reason; and the failures."""

    ran: int = 0
    parsed: int = 0
    text: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __iadd__(self, other: "Outcome") -> "Outcome":
        self.ran += other.ran
        self.parsed += other.parsed
        self.text += other.text
        self.left_out += other.left_out
        self.failures += other.failures
        return self

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        return (
            f"{self.ran} run, {self.parsed} parsed, {self.left_out.total()} not run{reasons and f' ({reasons})'}, "
            f"{self.text} of text, {len(self.failures)} failed"
        )


def draw_once(folder: Path) -> None:
    """Makes `folder`, with an `evaclip` that pages may share; it stands on PATH in front of the next one."""
    folder.mkdir()
    (folder / "evaclip").write_text(DRAW_ONCE)
    (folder / "evaclip").chmod(0o755)


class PageRunner:
    """Runs the blocks of one page, in order."""

    def __init__(
        self, page: Path, python: Path, scratch: Path, *programs: Path, marks: Sequence[dict[str, Any]]
    ) -> None:
        self.page, self.scratch, self.marks = page, scratch, marks
        self.outcome = Outcome()
        (scratch / "benchmarks").symlink_to(ROOT / "benchmarks")
        (scratch / "home").mkdir()
        self.environment = environment(python, scratch / "home", *programs)
        self.inside = subprocess.Popen(
            ["python", INSIDE, ROOT],  # the first on PATH
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=scratch,
            env=self.environment,
            text=True,
        )

    def run(self) -> Outcome:
        try:
            for block in read_blocks(ROOT / self.page, self.page, self.marks):
                self._block(block)
            for span in read_spans(ROOT / self.page):
                self._ask(f"{self.page}: {span}", "span", span)
                self.outcome.parsed += 1
        except MarkError as exc:
            self.outcome.failures.append(str(exc))
        finally:
            self.inside.kill()
            self.inside.communicate()
        return self.outcome

    def _block(self, block: Block) -> None:
        if block.language == "text":
            self.outcome.text += 1
        elif block.language in SHELL:
            self._shell_block(block)
        elif not self._left_out(mark := block.mark_of("")):
            where = (str(block.page), block.line)
            if block.language == "yaml":
                self._ask(block.place, "configuration", block.code)
            else:
                self._ask(block.place, "compile" if mark else "python", block.before + block.code, *where)
            self._count(parsed=mark is not None or block.language == "yaml")

    def _shell_block(self, block: Block) -> None:
        script: list[str] = []
        if block.before:
            self._bash(block.place, block.before)
        for command, mark in block.commands():
            if self._left_out(mark):
                continue
            self._count(parsed=mark is not None)
            if mark:
                self._ask(f"{block.place}: {command}", "command", command)
            else:
                script.append(command)
        if script:
            self._bash(block.place, "\n".join(script))

    def _bash(self, place: str, script: str) -> None:
        with subprocess.Popen(
            ["bash", "-exo", "pipefail", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.scratch,
            env=self.environment,
            text=True,
            start_new_session=True,  # ends the programs that a command started
        ) as process:
            try:
                printed, _ = process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                printed = f"{process.communicate()[0]}\nnot done after {SECONDS} s"
        if process.returncode:
            self.outcome.failures.append(f"{place}: exit {process.returncode}\n{printed[-4000:]}")

    def _ask(self, place: str, *request: object) -> None:
        assert self.inside.stdin is not None
        assert self.inside.stdout is not None
        limit = threading.Timer(SECONDS, self.inside.kill)
        limit.start()
        try:
            self.inside.stdin.write(json.dumps(request) + "\n")
            self.inside.stdin.flush()
            answer = self.inside.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            limit.cancel()
        problem = json.loads(answer) if answer else f"the interpreter died, or took more than {SECONDS} s"
        if problem:
            self.outcome.failures.append(f"{place}\n{problem[-4000:]}")

    def _left_out(self, mark: Mark | None) -> bool:
        if mark is None or mark.verdict != "no":
            return False
        self.outcome.left_out[mark.reason] += 1
        return True

    def _count(self, parsed: bool) -> None:
        self.outcome.parsed += parsed
        self.outcome.ran += not parsed


def run_page(
    page: Path, python: Path, scratch: Path, *programs: Path, marks: Sequence[dict[str, Any]] | None = None
) -> Outcome:
    """Runs the blocks of a page in `scratch`; PATH has the folders `programs`, then the environment of `python`.

    Args:
        marks: how blocks are run; default: the page's in `marks.toml`.
    """
    marks = MARKS.get(str(page), []) if marks is None else marks
    return PageRunner(page, python, scratch, *programs, marks=marks).run()


def where_installed(python: Path) -> Path:
    """The folder from which this Python imports the package outside the source tree."""
    code = "import importlib.util as u; print(u.find_spec('evakernels').origin)"
    found = subprocess.run([python, "-c", code], cwd="/", env=environment(python, Path("/")), capture_output=True)
    if found.returncode:
        raise SystemExit(f"error: evakernels isn't installed for {python}")
    return Path(found.stdout.decode().strip())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="such as docs/data.md (default: all)")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of the environment (default: this)")
    parser.add_argument("--editable", action="store_true", help="the package may be imported from the source tree")
    args = parser.parse_args(argv)
    python = args.python.absolute()  # not resolved: a virtual environment is known by its link
    package = where_installed(python)
    if package.is_relative_to(ROOT) and not package.is_relative_to(python.parents[1]) and not args.editable:
        raise SystemExit(f"error: {python} imports {package}; install a wheel, or allow it with --editable")
    print(f"{package.parent} by {python}")
    total = Outcome()
    with tempfile.TemporaryDirectory() as top, warm(python, environment(python, Path(top))) as programs:
        draw_once(shared := Path(top) / "shared")
        for number, page in enumerate(args.pages or pages()):
            (scratch := Path(top) / str(number)).mkdir()
            outcome = run_page(page, python, scratch, shared, programs)
            print(f"{page}: {outcome}", *outcome.failures, sep="\n", flush=True)
            total += outcome
    print(f"all pages: {total}")
    return 1 if total.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
