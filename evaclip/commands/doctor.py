"""`evaclip doctor`: installed packages and available backends."""

import argparse
import json
import shutil
import sys
from typing import Any

from evaclip.commands.parser import leaf


def add_commands(subparsers: Any) -> None:
    """Adds `doctor` to the command line."""
    help = "show installed packages, available backends, and why others are not available"
    examples = ["evaclip doctor", "evaclip doctor --verbose", "evaclip doctor --json > doctor.json"]
    parser = leaf(subparsers, "doctor", help=help, examples=examples)
    parser.add_argument("--verbose", action="store_true", help="every op and every package too")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints one screen; exits with 1 if something is there that doesn't work."""
    from evaclip.doctor import MAX_WIDTH, MIN_WIDTH, diagnose, marks_for, render

    facts = diagnose()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        encoding = sys.stdout.encoding or "utf-8"
        width = max(MIN_WIDTH, min(shutil.get_terminal_size().columns, MAX_WIDTH))
        text = render(facts, args.verbose, width, marks_for(encoding))
        print(text.encode(encoding, "replace").decode(encoding))
    if facts["problems"]:
        raise SystemExit(1)
