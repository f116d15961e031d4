"""Runs Python blocks and parses command lines of the documentation, inside the tested environment.

`run_docs.py` starts this file with that environment's Python, in a scratch folder. It reads a request per line from
standard input, and answers each with a line: an empty string, or the error.
"""

import contextlib
import io
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import metadata
from pathlib import Path
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of blocks and their programs goes to standard error
    sys.path[0] = ""  # the scratch folder, as in a user's session
    page = Page(Path(sys.argv[1]))
    for line in sys.stdin:
        kind, *arguments = json.loads(line)
        print(json.dumps(page.answer(getattr(page, kind), arguments)), file=answers, flush=True)


class Page:
    """One page's Python blocks share their names; its commands are parsed where the blocks left their files."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self.names: dict[str, Any] = {"__name__": "__main__"}

    def answer(self, action: Callable[..., None], arguments: list[Any]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                action(*arguments)
            except SystemExit as exc:
                return f"exit {exc.code}\n{printed.getvalue()}" if exc.code else ""
            except BaseException:
                return printed.getvalue() + traceback.format_exc()
        return ""

    def python(self, code: str, name: str, line: int) -> None:
        """Runs a block; its lines are counted as in the page."""
        exec(compile("\n" * line + code, name, "exec"), self.names)

    def compile(self, code: str, name: str, line: int) -> None:
        """Checks the syntax of a block."""
        compile("\n" * line + code, name, "exec")

    def command(self, command: str) -> None:
        """Parses a command with its parser, and the configuration of a training."""
        words = shlex.split(command, comments=True)
        while re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        if words[0] == "srun":
            words = words[next(place for place, word in enumerate(words) if word in ("evaclip", "torchrun")) :]
        if words[0] == "sbatch":
            script = next(place for place, word in enumerate(words) if word.endswith(".sbatch"))
            self._files([words[script]])
            words[: script + 1] = ["evaclip", "train"]
        if words[0] in ("python", "torchrun") and "-m" in words:
            words = [word for word in words[words.index("-m") + 1 :] if word != "--"]
        match words:
            case ["pip", *_]:
                self._extras(command)
            case ["make", target]:
                makefile = (self.checkout / "Makefile").read_text("utf-8")
                if not re.search(rf"^(\S+ )*{target}( \S+)*:", makefile, re.MULTILINE):
                    raise ValueError(f"the Makefile has no target {target!r}")
            case ["pytest", *rest]:
                self._files(rest)
            case ["python", file, *_] if file.endswith(".py"):
                self._files([file])
            case ["evaclip", *rest]:
                self._evaclip(rest)
            case ["benchmarks", *rest]:
                import_module("benchmarks.cli")._build_parser().parse_args(rest)
            case _:
                raise ValueError("no parser is known for this command; mark it with 'no'")

    def span(self, command: str) -> None:
        """Parses a command in running text; words in capitals stand for the user's names."""
        of_benchmarks = command.startswith("python -m benchmarks")
        parser = import_module("benchmarks.cli")._build_parser() if of_benchmarks else self._parser()
        words = shlex.split(command)[3 if of_benchmarks else 1 :]
        # A verb alone stands for the command with all its options.
        parser.parse_args(words if any(re.search("[A-Z-]", word) for word in words) else [*words, "--help"])

    def configuration(self, text: str) -> None:
        """Reads a YAML block as the configuration of a training."""
        Path("documented.yaml").write_text(text, encoding="utf-8")
        self._evaclip(["train", "tiny", "--config", "documented.yaml"])

    def _parser(self) -> Any:
        return import_module("evaclip.commands.main").build_parser()

    def _evaclip(self, words: list[str]) -> None:
        if words[0] == "train" and len(words) > 1 and "--print-config" not in words:
            words = [*words, "--print-config"]
        args = self._parser().parse_args(words)
        if words[0] == "train":
            args.run(args)

    def _extras(self, command: str) -> None:
        known = metadata("evakernels").get_all("Provides-Extra") or []
        for found in re.findall(r"(?:evakernels|\.|\.whl)\[([\w,-]+)\]", command):
            if missing := set(found.split(",")) - set(known):
                raise ValueError(f"no such extra: {', '.join(missing)}; there are {', '.join(known)}")

    def _files(self, words: list[str]) -> None:
        for word in words:
            if "/" in word and not (self.checkout / word).exists():
                raise FileNotFoundError(f"{word} isn't in the repository")


if __name__ == "__main__":
    main()
