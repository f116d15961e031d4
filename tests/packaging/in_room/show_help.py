"""`--help` of every subcommand of evaclip, however deep; prints their names."""

import argparse
import contextlib
import io
from collections.abc import Iterator

from evaclip.commands.main import build_parser, main


def commands(parser: argparse.ArgumentParser, *words: str) -> Iterator[tuple[str, ...]]:
    yield words
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from commands(child, *words, name)


for words in commands(build_parser()):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main([*words, "--help"])
        except SystemExit as end:
            failed = bool(end.code)
            if failed:
                raise
    assert out.getvalue().startswith("usage: evaclip"), words
    print("evaclip", *words)
