"""Parsers, options and error messages that the commands share."""

import argparse
import io
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from evaclip.data import KINDS
from evaclip.errors import Refused, RunFailed, RunInterrupted, UserError, hint, unknown_name
from evaclip.extras import with_remedy
from evaclip.launchers import stop_restarts
from evaclip.outputs import silence

if TYPE_CHECKING:
    from evaclip.data import Source

Run = Callable[[argparse.Namespace], None]

_SOURCE_OPTIONS = ("image_key", "caption_key", "csv_separator", "exif_orientation", "min_size", "max_image_pixels")


class CommandParser(argparse.ArgumentParser):
    """Report a wrong command line in the form of all other errors.

    Attributes:
        instead: replacements of other programs' options, by option, for errors.
    """

    instead: Mapping[str, str] = {}

    def error(self, message: str) -> Any:
        print(f"error: {message} (see '{self.prog} --help')", file=sys.stderr)
        raise SystemExit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # Before Python 3.14, argparse suggests no near choice.
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, str(unknown_name("choice", value, map(str, action.choices))))


def positive(text: str) -> float:
    """Parse a number above 0, as the `type` of an argument."""
    with suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")


def part_of_n(text: str) -> tuple[int, int]:
    """Parse I/N, part I of N parts, as the `type` of an argument."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N - 1, got {text!r}")
    return int(number), int(count)


def leaf(
    subparsers: Any, name: str, run: Run | None = None, *, help: str, examples: Sequence[str] = (), extra: str = ""
) -> CommandParser:
    """Add the parser of a command that calls `run`, with `--debug`, and its examples in `--help`.

    A missing package is reported with `extra`, if that extra has it.
    """
    epilog = "examples:\n" + "\n".join(f"  {line}" for line in examples) if examples else None
    parser: CommandParser = subparsers.add_parser(
        name,
        help=help,
        description=help[:1].upper() + help[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(parser=parser, run=run, extra=extra)
    return parser


def add_reading(parser: Any, *, decoding: bool = True) -> None:
    """Add `--kind`, `--image-key`, `--caption-key`, and with `decoding` the options on decoding."""
    add = parser.add_argument
    add("--kind", choices=KINDS, default="auto", help="format of the data (default: auto)")
    add("--image-key", metavar="KEY", help="member suffixes ('jpg;png') in shards, or column, of the images")
    add("--caption-key", metavar="KEY", help="'txt', 'cls', 'json:FIELD', or column, of the captions or labels")
    if decoding:
        add("--exif-orientation", action="store_true", help="rotate images as their EXIF data says")
        add("--min-size", type=int, default=0, metavar="N", help="least pixels of an image's shorter side")
        add("--max-image-pixels", type=int, metavar="N", help="most pixels of an image (default: Pillow's limit)")


def open_data(path: str, args: argparse.Namespace, **options: Any) -> "Source":
    """Open a data set with the options of `add_reading`."""
    from evaclip.data import open_source

    chosen = {name: value for name in _SOURCE_OPTIONS if (value := getattr(args, name, None)) is not None}
    return open_source(path, args.kind, **chosen, **options)


def run_command(parser: CommandParser, argv: Sequence[str] | None) -> int:
    """Run the command that `argv` names.

    Returns:
        0 on success, 1 for a failure, 2 for wrong input, 75 (EX_TEMPFAIL) for an interrupted run, 130 for Ctrl-C, 141
        if the reader of stdout is gone.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell's >&-; the next file that is opened must not replace it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for terminals without a character of a bar or a name
    debug, extra = False, ""
    try:
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            _refuse(getattr(args, "parser", parser), unknown)
        debug, extra = args.debug, args.extra
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except SystemExit as ended:
        with suppress(BrokenPipeError):
            sys.stdout.flush()
            if not isinstance(ended.__context__, BrokenPipeError):  # rich turns one into a SystemExit
                raise
        silence()
        return 141
    except Exception as raised:
        if isinstance(raised, BrokenPipeError) and silence():
            return 141
        if debug:
            raise
        exc = with_remedy(raised, extra)
        if isinstance(exc, PermissionError) and exc.filename is not None:  # of a file that the user named
            exc = UserError(f"{exc.filename}: {exc.strerror}")
        message = " ".join(str(exc).split())
        is_plain = isinstance(exc, UserError | RunFailed | RunInterrupted | ValueError | TypeError)
        print(f"error: {message if is_plain else f'{type(exc).__name__}: {message}'}", file=sys.stderr)
        if isinstance(exc, UserError | RunFailed):
            stop_restarts(str(exc), at_once=isinstance(exc, RunFailed))
        else:
            print("(--debug shows the traceback)", file=sys.stderr)
        if isinstance(exc, RunInterrupted):
            return os.EX_TEMPFAIL
        return 2 if isinstance(exc, UserError | ValueError | TypeError) and not isinstance(exc, Refused) else 1
    return 0


def _refuse(command: CommandParser, unknown: list[str]) -> None:
    option = unknown[0].partition("=")[0]
    if option in command.instead:
        command.error(f"unrecognized arguments: {option}; instead: {command.instead[option]}")
    known = command._option_string_actions if option.startswith("-") else ()
    command.error(f"unrecognized arguments: {' '.join(unknown)}{hint(option, known)}")
