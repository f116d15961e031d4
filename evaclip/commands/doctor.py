"""`evaclip doctor`: installed packages and available backends."""

import argparse
import json
import shutil
from typing import Any

from evaclip.commands.parser import leaf

_EXAMPLES = ("evaclip doctor", "evaclip doctor --json > doctor.json")

_WIDTHS = 60, 100
"""Fewest and most columns of the output."""


def add_commands(subparsers: Any) -> None:
    """Add `doctor` to the command line."""
    help = "show installed packages, available backends, and why others are not available"
    add = leaf(subparsers, "doctor", _run, help=help, examples=_EXAMPLES).add_argument
    add("--json", action="store_true", help="print everything, every op and package too, as one JSON object")


def _run(args: argparse.Namespace) -> None:
    """Print one screen; exit with 1 if there are defects."""
    from evaclip.doctor import diagnose, render

    facts = diagnose()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print(render(facts, width=min(max(shutil.get_terminal_size().columns, _WIDTHS[0]), _WIDTHS[1])))
    if facts["problems"]:
        raise SystemExit(1)
