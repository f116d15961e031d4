"""The `evaclip` command."""

from collections.abc import Sequence

from evaclip.commands import convert, data, demo, doctor, eval, export, index, plan, report, search, serve, train
from evaclip.commands.parser import CommandParser, run_command
from evaclip.extras import DISTRIBUTION
from evaclip.machine import limit_spinning, version_of


def build_parser() -> CommandParser:
    """Return the parser of all commands."""
    parser = CommandParser(prog="evaclip", description="Train, evaluate and inspect EVA-CLIP models.")
    parser.add_argument("--version", action="version", version=f"evaclip {version_of(DISTRIBUTION)}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=CommandParser)
    for verb in (train, eval, data, convert, export, index, search, serve, plan, report, doctor, demo):
        verb.add_commands(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of `evaclip`; see `run_command` for the exit codes."""
    limit_spinning()
    return run_command(build_parser(), argv)
