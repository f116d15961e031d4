"""The `evaclip` command, assembled of its verbs."""

import argparse
from collections.abc import Sequence
from typing import Any

from evaclip.commands import (
    convert,
    data,
    demo,
    doctor,
    eval,
    export,
    index,
    plan,
    report,
    search,
    serve,
    train,
    watch,
)
from evaclip.commands.parser import CommandParser, run_command

_VERBS = (train, watch, plan, eval, index, search, serve, data, convert, export, demo, report, doctor)


class _Version(argparse.Action):
    """Asks for the version when it is wanted: no other command shall wait for torch."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        from evaclip import __version__

        print(f"evaclip {__version__}")
        parser.exit()


def build_parser() -> CommandParser:
    """The whole command line."""
    parser = CommandParser(prog="evaclip", description="Train, evaluate and inspect EVA-CLIP models.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version of evaclip and evakernels")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=CommandParser)
    for verb in _VERBS:
        verb.add_commands(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command of `evaclip`."""
    return run_command(build_parser(), argv)
