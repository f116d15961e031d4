"""What all commands share: how a parser is made, and how a mistake becomes one line."""

import argparse
import io
import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from evaclip.errors import Refused, RunFailed, UserError
from evaclip.extras import with_remedy
from evaclip.outputs import silence
from evaclip.torchrun import stop_restarts


class CommandParser(argparse.ArgumentParser):
    """Reports a wrong command line in the same form as every other mistake."""

    def error(self, message: str) -> Any:
        print(f"error: {message} (see '{self.prog} --help')", file=sys.stderr)
        raise SystemExit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Python's own names all choices and, before 3.14, none that may be meant."""
        if action.choices is not None and value not in action.choices:
            from evakernels.names import unknown  # and with it torch

            raise argparse.ArgumentError(action, unknown("choice", value, map(str, action.choices)))


def positive(text: str) -> float:
    """A number above 0, as the `type` of an argument."""
    with suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")


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
    parser.set_defaults(parser=parser)
    return parser


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Runs the command that `argv` names.

    Returns:
        0 on success, 1 for a failure, 2 for wrong input, 130 for Ctrl-C, 141 where nobody read all that was printed.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-: no file that is opened next shall get what is printed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a bar or a name that a terminal can't show ends no command
    debug = False
    try:
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            of = getattr(args, "parser", parser)
            of.error(_unknown_arguments(unknown, of))
        debug = args.debug
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except SystemExit as ended:
        with suppress(BrokenPipeError):
            sys.stdout.flush()
            if not isinstance(ended.__context__, BrokenPipeError):  # which rich makes this of
                raise
        silence()
        return 141
    except Exception as raised:
        if isinstance(raised, BrokenPipeError) and silence():
            return 141
        if debug:
            raise
        exc = with_remedy(raised)
        if isinstance(exc, PermissionError) and exc.filename is not None:  # of what the user named, or is in it
            exc = UserError(f"{exc.filename}: {exc.strerror}")
        print(f"error: {_one_line(exc)}", file=sys.stderr)
        if isinstance(exc, UserError | RunFailed):
            stop_restarts(str(exc), at_once=isinstance(exc, RunFailed))
        else:
            print("(--debug shows the traceback)", file=sys.stderr)
        return 2 if isinstance(exc, UserError | ValueError | TypeError) and not isinstance(exc, Refused) else 1
    return 0


def _unknown_arguments(unknown: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """What nobody asked for, and the option that the first one may mean."""
    from evakernels.names import hint  # and with it torch

    option = unknown[0].partition("=")[0]
    known = parser._option_string_actions if option.startswith("-") else ()
    return f"unrecognized arguments: {' '.join(unknown)}{hint(option, known)}"


def _one_line(exc: Exception) -> str:
    text = " ".join(str(exc).split())
    return text if isinstance(exc, UserError | RunFailed | ValueError | TypeError) else f"{type(exc).__name__}: {text}"
