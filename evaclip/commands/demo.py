"""`evaclip demo`: the whole story in one command."""

import argparse
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from evaclip.commands.parser import leaf
from evaclip.demo.story import BUDGET_MINUTES, DATA_FOLDER, RUN_FOLDER, run_demo

_EXAMPLES = ("evaclip demo", "evaclip demo --out runs/demo --budget-minutes 8")


def add_commands(subparsers: Any) -> None:
    """Add `demo` to the command line."""
    help = "train on emoji, evaluate on another style of drawing, write a report, and search in the images"
    add = leaf(subparsers, "demo", _run, help=help, examples=_EXAMPLES, extra="demo").add_argument
    folders = (("--out", RUN_FOLDER, "the run, its report and its store"), ("--data", DATA_FOLDER, "the shards"))
    for name, folder, content in folders:
        add(name, type=Path, default=folder, metavar="FOLDER", help=f"for {content} (default: %(default)s)")
    help = "how long the training may take (default: %(default)g)"
    add("--budget-minutes", type=float, default=BUDGET_MINUTES, metavar="N", help=help)


def _run(args: argparse.Namespace) -> None:
    report, store = run_demo(args.out, data=args.data, minutes=args.budget_minutes)
    print(report)
    print("search in these images, in the browser:")
    print(f"  {_program()} serve {shlex.quote(str(store))} --open")


def _program() -> str:
    """Command for this program: its name, or its path if the environment isn't active."""
    own = Path(sys.executable).with_name("evaclip")
    if not own.is_file():
        return f"{shlex.quote(sys.executable)} -m evaclip"
    found = shutil.which("evaclip")
    if found and Path(found).samefile(own):
        return "evaclip"
    here = Path.cwd()
    return shlex.quote(str(own.relative_to(here) if own.is_relative_to(here) else own))
