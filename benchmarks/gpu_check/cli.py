"""The command line: checks this machine's GPU, or merges what several calls have left."""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from benchmarks.gpu_check import bundle as bundles
from benchmarks.gpu_check import summary
from benchmarks.gpu_check.child import stage_names
from benchmarks.gpu_check.records import SCHEMA, Journal, JournalFull
from benchmarks.gpu_check.stage import Settings, Unit
from benchmarks.gpu_check.supervisor import BUDGET, Supervisor
from benchmarks.origin import ROOT
from evaclip.atomic import writing
from evaclip.commands.parser import CommandParser, positive, run_command
from evaclip.errors import UserError, unknown_name

_PACKAGES = ROOT / "build/gpu-check-packages"
_PLANNING = 120
"""Seconds until the machine must have told what it is."""


def main(argv: Sequence[str] | None = None, package: str = Settings.package) -> int:
    """0 if all passed, 1 for failures, 2 for wrong input, 3 if work is left, 4 without a GPU, 5 for a full disk."""
    return run_command(_build_parser(package), argv)


def _build_parser(package: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m benchmarks.gpu_check",
        description="Prove and measure this machine's GPU, in stages of a few minutes; see docs/gpu-check.md.",
        epilog="exit status: 0 all passed, 1 something failed, 2 wrong input, 3 work is left, 4 no GPU, 5 disk full",
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check"), metavar="FOLDER", help="of the journal")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on with this journal")
    parser.add_argument("--budget", type=positive, default=BUDGET, metavar="SECONDS", help="default: %(default)g")
    parser.add_argument("--only", action="append", default=[], metavar="STAGE", help="may be given several times")
    parser.add_argument("--bundle", type=Path, metavar="FOLDER", help="libraries and wheels, of `make gpu-bundle`")
    parser.add_argument(
        "--rehearsal", action="store_true", help="on interpreted kernels and tiny shapes, without a GPU"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=_run, package=package)
    verbs = parser.add_subparsers(metavar="merge", parser_class=CommandParser)
    merge = verbs.add_parser("merge", help="write the journals' results into the repository, and its tables anew")
    merge.add_argument("journals", type=Path, nargs="+", metavar="FILE", help="of one card and commit")
    merge.add_argument("--mixed", action="store_true", help="of several; of a case that several have, the last counts")
    merge.set_defaults(run=_merge)
    return parser


def _run(args: argparse.Namespace) -> None:
    folder = str(args.bundle.resolve()) if args.bundle else ""
    settings = Settings("cpu" if args.rehearsal else "cuda", args.rehearsal, folder, package=args.package)
    known = stage_names(settings)
    for name in args.only:
        if name not in known:
            raise unknown_name("stage", name, known)
    bundle = None if args.bundle is None else _install(args.bundle)
    environment = _environment(bundle is not None)
    plan = _plan(settings, args.only, environment)
    if not (plan["machine"]["gpu"] or args.rehearsal):
        print("\n".join(f"{stage}: no GPU" for stage in {**plan["shares"], **plan["errors"]}))
        raise SystemExit(summary.NO_GPU)
    if bundle is not None:
        bundle.check_gpu(*plan["machine"]["capability"])
        plan["machine"]["commit"] = plan["machine"]["commit"] or bundle.commit
    try:
        journal = _journal(args, plan["machine"], bundle.name if bundle else "")
    except JournalFull as exc:
        print(f"error: {exc}", file=sys.stderr)
        raise SystemExit(summary.DISK_FULL) from None
    units = [Unit(**values) for values in plan["units"]]
    supervisor = Supervisor(settings, journal, plan["shares"], environment)
    raise SystemExit(_supervise(supervisor, units, plan["errors"], args.budget))


def _merge(args: argparse.Namespace) -> None:
    from benchmarks.gpu_check.merge import merge

    for path in merge(args.journals, mixed=args.mixed):
        print(path)


def _supervise(supervisor: Supervisor, units: list[Unit], errors: dict[str, str], budget: float) -> int:
    def stop(number: int, frame: FrameType | None) -> None:
        supervisor.stop(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    full = ""
    try:
        supervisor.run(units, budget)
    except JournalFull as exc:
        full = str(exc)
    found = summary.summarize(supervisor.journal.read(), units, errors)
    summary.show(found, Console())
    print(f"journal: {supervisor.journal.path}")
    try:
        summary.write(found, supervisor.journal.path)
    except OSError as exc:
        full = full or f"cannot write the summary: {exc.strerror}"
    if full:
        print(f"error: {full}", file=sys.stderr)
        return summary.DISK_FULL
    return int(found["status"])


def _plan(settings: Settings, stages: Sequence[str], environment: dict[str, str]) -> dict[str, Any]:
    """What `child.plan` finds; in a process of its own, as it imports torch and the kernels."""
    command = [sys.executable, "-m", "benchmarks.gpu_check.child", "plan", settings.to_json(), *stages]
    try:
        result = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=_PLANNING
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"planning took more than {_PLANNING} s: {' '.join(command[:4])}") from None
    if result.returncode:
        raise UserError(f"planning ended with status {result.returncode}: {result.stderr.strip()[-500:]}")
    plan: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return plan


def _install(folder: Path) -> bundles.Bundle:
    bundle = bundles.read(folder)
    bundle.check(ROOT)
    bundle.install(ROOT, _PACKAGES)
    return bundle


def _environment(with_packages: bool) -> dict[str, str]:
    """That of the units."""
    folders = [str(ROOT), str(_PACKAGES) if with_packages else "", os.environ.get("PYTHONPATH", "")]
    changes = {"PYTHONPATH": os.pathsep.join(filter(None, folders)), "PYTHONFAULTHANDLER": "1"}
    return os.environ | changes


def _journal(args: argparse.Namespace, machine: dict[str, Any], bundle: str) -> Journal:
    """A new journal with its header, or one that this machine, commit and bundle may go on with."""
    header = {"rehearsal": args.rehearsal, "commit": machine["commit"], "bundle": bundle}
    if args.resume is None:
        now = datetime.datetime.now(datetime.UTC)
        journal = Journal(args.out / f"{now:%Y-%m-%d-%H%M%S}.jsonl")
        with writing(args.out):
            args.out.mkdir(parents=True, exist_ok=True)
        journal.append("header", schema=SCHEMA, date=now.isoformat(timespec="seconds"), **header, machine=machine)
        return journal
    journal = Journal(args.resume)
    former = journal.read()[0]
    ours = header | {"card": machine["name"]}
    for name, value in (former | {"card": former["machine"]["name"]}).items():
        if name in ours and ours[name] != value:
            raise UserError(f"{args.resume} is of {name} {value!r}, and this is {ours[name]!r}: begin a new journal")
    return journal
