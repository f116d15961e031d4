"""`evaclip watch`: how a run is going, live in the terminal, from its folder alone."""

import argparse
import time
from pathlib import Path
from typing import Any

from evaclip.commands.parser import leaf, positive


def add_commands(subparsers: Any) -> None:
    """Adds `watch` to the command line."""
    parser = leaf(
        subparsers,
        "watch",
        help="show how a run is going, live",
        examples=["evaclip watch runs/tiny", "evaclip watch runs/tiny --once"],
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the folder of a run, on this machine or mounted")
    parser.add_argument("--once", action="store_true", help="print the present state and stop")
    parser.add_argument(
        "--seconds", type=positive, default=2.0, metavar="S", help="between updates (default: %(default)s)"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.live import Live

    from evaclip.report.live import render

    console = Console()
    if args.once or not console.is_terminal:
        console.print(render(args.run_dir, console.width))
        return
    with Live(render(args.run_dir, *console.size), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(args.seconds)
            live.update(render(args.run_dir, *console.size), refresh=True)
