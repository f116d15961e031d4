"""The `evaclip` command: assembles the verbs that the packages provide and turns mistakes into one line."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from evaclip.errors import UserError
from evaclip.extras import with_remedy


class CommandParser(argparse.ArgumentParser):
    """Reports a wrong command line in the same form as every other mistake."""

    def error(self, message: str) -> Any:
        print(f"error: {message} (see '{self.prog} --help')", file=sys.stderr)
        raise SystemExit(2)


def leaf(subparsers: Any, name: str, *, help: str, examples: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Adds the parser of one command, with `--debug` and its examples in `--help`."""
    epilog = "examples:\n" + "\n".join(f"  {line}" for line in examples) if examples else None
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=help,
        description=help[:1].upper() + help[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    # Imported here so that `import evaclip.cli` stays cheap for those who only want `leaf`.
    from evaclip import convert, demo, export, report, watch
    from evaclip.data import command as data
    from evaclip.doctor import command as doctor
    from evaclip.eval import command as evaluate
    from evaclip.plan import command as plan
    from evaclip.train import command as train

    parser = CommandParser(prog="evaclip", description="Train, evaluate and inspect EVA-CLIP models.")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=CommandParser)
    for module in (train, watch, plan, evaluate, data, convert, export, demo, report, doctor):
        module.add_commands(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command of `evaclip`."""
    return run_command(build_parser(), argv)


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Runs the command that `argv` names; 0 on success, 1 for a failure, 2 for wrong input, 130 for Ctrl-C."""
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        return 130
    except Exception as raised:
        if args.debug:
            raise
        exc = with_remedy(raised)
        print(f"error: {_one_line(exc)}", file=sys.stderr)
        if not isinstance(exc, UserError):
            print("(--debug shows the traceback)", file=sys.stderr)
        return 2 if isinstance(exc, UserError | ValueError | TypeError) else 1
    return 0


def _one_line(exc: Exception) -> str:
    text = " ".join(str(exc).split())
    return text if isinstance(exc, UserError | ValueError | TypeError) else f"{type(exc).__name__}: {text}"


if __name__ == "__main__":
    raise SystemExit(main())
