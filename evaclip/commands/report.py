"""`evaclip report`: a run as a page, or several runs beside each other."""

import argparse
from pathlib import Path
from typing import Any

from evaclip.commands.parser import leaf
from evaclip.errors import UserError


def add_commands(subparsers: Any) -> None:
    """Adds `report` to the command line."""
    parser = leaf(
        subparsers,
        "report",
        help="write report.html of a run, or comparison.html of several",
        examples=[
            "evaclip report runs/demo",
            "evaclip report runs/demo --output docs/report",
            "evaclip report runs/a runs/b --output runs/a-and-b",
        ],
    )
    parser.add_argument(
        "run_dirs", metavar="RUN_DIR", type=Path, nargs="+", help="the folder of a run, which may be going on still"
    )
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="where to write it (default: a single RUN_DIR)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from evaclip.report import write_comparison, write_report

    if len(args.run_dirs) == 1:
        print(write_report(args.run_dirs[0], args.output))
        return
    if args.output is None:
        raise UserError("--output FOLDER is not set: a comparison of several runs belongs into none of them")
    print(write_comparison(args.run_dirs, args.output))
