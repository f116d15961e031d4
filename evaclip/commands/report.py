"""`evaclip report`: a run as a page or in the terminal, or a comparison of several runs."""

import argparse
import time
from pathlib import Path
from typing import Any

from evaclip.commands.parser import leaf
from evaclip.errors import UserError

_INTERVAL = 2.0
"""Seconds between updates of --follow."""
_EXAMPLES = (
    "evaclip report runs/demo",
    "evaclip report runs/demo --text --follow",
    "evaclip report runs/a runs/b --output runs/a-and-b",
)


def add_commands(subparsers: Any) -> None:
    """Add `report` to the command line."""
    help = "write report.html of a run, or comparison.html of several runs; --text shows a run in the terminal"
    add = leaf(subparsers, "report", _run, help=help, examples=_EXAMPLES).add_argument
    add("runs", metavar="RUN", type=Path, nargs="+", help="folder of a run, which may be training")
    add("--output", metavar="FOLDER", type=Path, help="where to write the page (default: a single RUN)")
    add("--text", action="store_true", help="show numbers, evaluations and events in the terminal")
    add("--follow", action="store_true", help="with --text: update until Ctrl-C")


def _run(args: argparse.Namespace) -> None:
    if args.follow and not args.text:
        raise UserError("--follow is for --text")
    if args.text:
        if len(args.runs) > 1 or args.output:
            raise UserError("--text takes one RUN and no --output")
        _show(args.runs[0], args.follow)
        return
    from evaclip.report import write_comparison, write_report

    if len(args.runs) == 1:
        print(write_report(args.runs[0], args.output))
        return
    if args.output is None:
        raise UserError("--output must name a folder for the comparison of several runs")
    print(write_comparison(args.runs, args.output))


def _show(run: Path, follow: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from evaclip.report.text import render

    console = Console()
    if not (follow and console.is_terminal):
        console.print(render(run, console.width))
        return
    with Live(render(run, *console.size), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(_INTERVAL)
            live.update(render(run, *console.size), refresh=True)
