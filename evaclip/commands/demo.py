"""`evaclip demo`: the whole story in one command."""

import argparse
from pathlib import Path
from typing import Any

from evaclip.commands.parser import leaf
from evaclip.demo.story import BUDGET_MINUTES, DATA_FOLDER, RUN_FOLDER, run_demo


def add_commands(subparsers: Any) -> None:
    """Adds `demo` to the command line."""
    parser = leaf(
        subparsers,
        "demo",
        help="train on real pictures, evaluate on a style never seen, and write a report",
        examples=["evaclip demo", "evaclip demo --out runs/demo --budget-minutes 8"],
    )
    folders = (("--out", RUN_FOLDER, "the run and its report"), ("--data", DATA_FOLDER, "the shards"))
    for name, folder, what in folders:
        parser.add_argument(name, type=Path, default=folder, metavar="FOLDER", help=f"for {what} (default: {folder})")
    parser.add_argument(
        "--budget-minutes",
        type=float,
        default=BUDGET_MINUTES,
        metavar="N",
        help=f"how long the training may take (default: {BUDGET_MINUTES:g})",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    for path in run_demo(args.out, data=args.data, minutes=args.budget_minutes):
        print(path)
