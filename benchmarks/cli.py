"""The command line: measure ops and models, compare results, and audit the GPU kernels."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import INSTALLED
from benchmarks.machine import is_checkout, warning
from benchmarks.measure import DEFAULT_DTYPES, DTYPES, Plan, run
from benchmarks.operation import Operation, get_operation, load, operations, suite
from benchmarks.results import Results, read_results
from evaclip.atomic import require_writable, writing
from evaclip.commands.parser import CommandParser, leaf, positive, run_command
from evaclip.errors import UserError, unknown_name

_EXAMPLES = {
    "list": ["python -m benchmarks list --device cuda"],
    "op": [
        "python -m benchmarks op --json run.json --html run.html",
        "python -m benchmarks op layer_norm gelu --shape 4096x768",
        "python -m benchmarks op layer_norm --shape small --threads 1  # the host's part of a call",
        "python -m benchmarks op rope_attention --shape 'eva02-l14@336 b4' --dtype bfloat16 --peer torch.compile",
        "python -m benchmarks op layer_norm --plugin my_norm.py --peer mine",
        "python -m benchmarks op loader --dtype float32",
    ],
    "model": [
        "python -m benchmarks model embed --json engines.json --page docs/benchmarks.md",
        "python -m benchmarks model embed --shape 'eva02-b16:text b1' --peer onnxruntime --peer openvino --busy",
        "python -m benchmarks model clip_step --shape 'eva02-b16@224 b16 drop50' --mode training",
        "python -m benchmarks model dropin --shape 'open_clip/vit-b-32 b32 t13'  # captions of 13 tokens, and padding",
    ],
    "compare": [
        "python -m benchmarks compare before.json after.json",
        "python -m benchmarks compare run.json --html run.html --page docs/benchmarks.md",
    ],
    "audit": [
        "python -m benchmarks audit layer_norm swiglu --kernels triton",
        "python -m benchmarks audit token_dropout --shape 'eva02-l14@336 b8 drop50' --arch sm_90 --explain",
    ],
}
_SEVERAL: dict[str, Any] = {"action": "append", "default": []}
_PAGE = "put the table, of engines or of ours against the best peers, into this Markdown page"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 on success, 1 for a regression or a broken error rule, 2 for wrong input.
    """
    return run_command(_build_parser(), argv)


def _build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m benchmarks",
        description="Measure ops and models: time, memory, error, and the share of this machine's roofline.",
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=CommandParser)
    _add_device(_add(verbs, "list", "show operations, shapes and peers, and who is absent", _list))
    for verb, text in (("op", "measure operations"), ("model", "measure whole models")):
        measuring = _add(verbs, verb, text, _measure)
        measuring.add_argument("names", nargs="*", metavar="NAME", help="default: all that don't need a request")
        measuring.set_defaults(models=verb == "model")
        _add_device(measuring)
        _add_measuring(measuring)
    compare = _add(verbs, "compare", "show a result again, or find what became slower between two", _compare)
    compare.add_argument("results", type=Path, nargs="+", metavar="RESULT", help="a file of --json")
    compare.add_argument(
        "--threshold", type=float, default=0.1, metavar="SHARE", help="changes that count (default: %(default)s)"
    )
    _add_pages(compare)
    audit = _add(verbs, "audit", "count what the GPU kernels do, in their PTX", _audit)
    audit.add_argument("names", nargs="*", metavar="NAME", help="an audited operation (default: all)")
    audit.add_argument("--kernels", choices=["cuda", "triton"], help="language of the kernels (default: both)")
    _add_choice(audit, " (default: a list for each)")
    audit.add_argument("--arch", **_SEVERAL, choices=["sm_80", "sm_90", "sm_100"], help="default: all")
    audit.add_argument("--explain", action="store_true", help="also the ten lines of the source that cost most")
    return parser


# Types of arguments: a file that can't be written is an error before hours of measuring, not after.


def _file(text: str) -> Path:
    require_writable(Path(text))
    return Path(text)


def _folder(text: str) -> Path:
    require_writable(Path(text, "trace"))
    return Path(text)


def _add(verbs: Any, name: str, help: str, action: Any) -> argparse.ArgumentParser:
    parser = leaf(verbs, name, help=help, examples=_EXAMPLES[name])
    parser.set_defaults(run=action)
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=sorted(DEFAULT_DTYPES), default="cpu", help="default: %(default)s")
    parser.add_argument("--plugin", type=Path, **_SEVERAL, metavar="FILE", help="adds candidates")
    text = "measure the installed evakernels, not this checkout's (default if this one isn't compiled)"
    parser.add_argument(INSTALLED, action="store_true", help=text)


def _add_choice(parser: Any, shapes: str) -> None:
    parser.add_argument("--shape", **_SEVERAL, metavar="NAME", help=f"such as 'eva02-l14@224 b8'{shapes}")
    parser.add_argument("--dtype", **_SEVERAL, choices=list(DTYPES), help="default: those usual on the device")


def _add_pages(parser: Any) -> None:
    parser.add_argument("--html", type=_file, metavar="FILE", help="write one HTML page with every row, and plots")
    parser.add_argument("--page", type=Path, metavar="FILE", help=_PAGE)


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    measured = parser.add_argument_group("what to measure (each may be given several times)")
    shapes = ", or sizes alone, such as 4096x768 for rows x channels, or 'small'; `list` shows the shapes of each"
    _add_choice(measured, shapes)
    measured.add_argument("--first", type=int, default=0, metavar="N", help="only the first N default shapes")
    measured.add_argument("--mode", **_SEVERAL, choices=["forward", "training"], help="default: both")
    measured.add_argument("--backend", **_SEVERAL, metavar="NAME", help="of this library (default: all)")
    measured.add_argument("--peer", **_SEVERAL, metavar="NAME", help="default: all; 'none' for none")
    how = parser.add_argument_group("how")
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's own number)")
    passes = "over all cases (default: %(default)s)"
    how.add_argument("--passes", type=int, default=Plan.passes, metavar="N", help=passes)
    seconds = "a candidate and pass (default: %(default)s)"
    how.add_argument("--seconds", type=positive, default=Plan.seconds, metavar="S", help=seconds)
    how.add_argument("--busy", action="store_true", help="time while a process spins on each core")
    how.add_argument("--profile", type=_folder, metavar="FOLDER", help="write a trace of each candidate there")
    how.add_argument("--check", action="store_true", help="exit 1 if an op of this library fails, or is wrong")
    results = parser.add_argument_group("results")
    results.add_argument("--json", type=_file, metavar="FILE", help="everything, for `compare`")
    _add_pages(results)


def _list(args: argparse.Namespace) -> None:
    from benchmarks.render import print_operations

    _load(args)
    print_operations(list(operations().values()), args.device)


def _measure(args: argparse.Namespace) -> None:
    from benchmarks.render import print_results

    _load(args)
    plan, chosen = _plan(args), _chosen(args)
    if args.page:
        from benchmarks.page import section, split_markdown  # needs matplotlib, which only pages do

        split_markdown(args.page, section([op.name for op in chosen], args.busy))  # before minutes have gone by
    with _progress() as progress:
        results = run(chosen, plan, progress)
    if args.json:  # before anything is printed: the reader of a pipe may be gone
        results.write_json(args.json)
    print_results(results)
    _write_pages(args, results)
    if results.interrupted:
        raise KeyboardInterrupt
    if args.profile:
        _profile(chosen, plan, results, args.profile)
    if args.check:
        _check(results)


def _chosen(args: argparse.Namespace) -> list[Operation]:
    if not args.names:
        return suite(args.models)
    kind, other = ("model", "op") if args.models else ("op", "model")
    known = [op.name for op in operations().values() if op.is_model == args.models]
    for name in args.names:
        if name not in known:
            if name in operations():
                raise UserError(f"NAME must be one of the {kind}s, got {name!r}; python -m benchmarks {other} {name}")
            raise unknown_name(kind, name, known)
    return [get_operation(name) for name in args.names]


def _plan(args: argparse.Namespace) -> Plan:
    if args.passes < 1:
        raise UserError(f"--passes must be at least 1, got {args.passes}")
    if args.first < 0:
        raise UserError(f"--first must be 0, for all, or more, got {args.first}")
    if args.threads is not None:
        if args.threads < 1:
            raise UserError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    several = {name: tuple(getattr(args, name[:-1])) for name in ("shapes", "dtypes", "modes", "backends", "peers")}
    return Plan(args.device, **several, passes=args.passes, seconds=args.seconds, first=args.first, busy=args.busy)


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal, a line for every tenth elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _print_tenths
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("measuring the machine")
        yield lambda done, total, title: bar.update(task, completed=done, total=total, description=title)


def _print_tenths(done: int, total: int, title: str) -> None:
    if title and done * 10 // total != (done - 1) * 10 // total:
        print(f"{done:,} of {total:,} measurements done; next is {title}", file=sys.stderr, flush=True)


def _profile(chosen: list[Operation], plan: Plan, results: Results, folder: Path) -> None:
    from benchmarks.candidates import candidates
    from benchmarks.measure import list_cases
    from benchmarks.profiling import profile_case

    measured = {row.key for row in results.rows if row.failure is None}
    for case in list_cases(chosen, plan):
        for candidate in candidates(case.op, plan.device, plan.backends, plan.peers)[0]:
            if (*case.key, candidate.name) in measured:
                print(profile_case(case, candidate, folder))


def _check(results: Results) -> None:
    """Print wrong peers; exit with 1 if a row of this library failed or is wrong."""
    ours = [row for row in results.rows if row.kind == "ours" and row.failure]
    peers = [row for row in results.rows if row.kind != "ours" and row.mark == "wrong"]
    for title, rows in (("peers that are wrong", peers), ("evakernels fails or is wrong", ours)):
        if rows:
            print("\n".join([f"{title}:", *(f"{' '.join(row.key)}: {row.failure}" for row in rows)]))
    if ours:
        raise SystemExit(1)


def _compare(args: argparse.Namespace) -> None:
    from benchmarks.compare import compare, print_comparison
    from benchmarks.render import print_results

    if len(args.results) > 2 or ((args.html or args.page) and len(args.results) > 1):
        raise UserError(f"RESULT must be one file, or two without --html and --page, got {len(args.results)}")
    first, *others = map(read_results, args.results)
    if not others:
        print_results(first)
        _write_pages(args, first)
        return
    comparison = compare(first, others[0], args.threshold)
    print_comparison(comparison)
    if comparison.regressions:
        raise SystemExit(1)


def _write_pages(args: argparse.Namespace, results: Results) -> None:
    """Write the HTML page, and the Markdown section, which an interrupted run leaves as it is."""
    if not args.html and not args.page:
        return
    from benchmarks.page import write_markdown, write_page

    load()  # pages have the summary of each operation
    if args.html:
        with writing(args.html):
            print(write_page(results, args.html))
    if args.page and not results.interrupted:
        print(write_markdown(results, args.page))


def _audit(args: argparse.Namespace) -> None:
    from benchmarks.audit import build, cases
    from benchmarks.audit.table import print_audit

    chosen = {kind: names for kind, names in cases.AUDITED.items() if args.kernels in (None, kind)}
    for name in args.names:
        if not any(name in names for names in chosen.values()):
            raise unknown_name("audited operation", name, {name for names in chosen.values() for name in names})
    work = []
    for kind, known in chosen.items():
        names = [name for name in args.names or known if name in known]
        listed = cases.list_cases(names, args.shape, args.dtype, kind) if names else []
        work += [(listed, arch, kind) for arch in build.ARCHS[kind] if listed and arch in (args.arch or [arch])]
    if not work:
        raise UserError("no audited kernels have these names, dtypes and architectures")
    build.require({kind for *_, kind in work})
    counts = []
    for done, (listed, arch, kind) in enumerate(work, start=1):
        print(f"{done} of {len(work)}: {len(listed)} calls of {kind} kernels on {arch}", file=sys.stderr, flush=True)
        counts += build.count_all(listed, arch, kind)
    print_audit(counts, explain=args.explain)


def _load(args: argparse.Namespace) -> None:
    """Load operations, peers and plugins; warn about an evakernels that isn't compiled."""
    if args.installed and is_checkout():
        raise UserError(f"{INSTALLED}: no evakernels is installed for {sys.executable}; pip install its wheel")
    load(args.plugin)
    if text := warning():
        print(f"warning: {text}", file=sys.stderr)
