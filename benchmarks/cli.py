"""The command line: what to measure, in which form to show it, and what to compare."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import origin, plugins
from benchmarks.operation import Operation, get_operation, operations, suite_operations
from benchmarks.results import Results, read_results
from benchmarks.suite import DEFAULT_DTYPES, DTYPES, Plan, run
from evaclip.atomic import require_writable, writing
from evaclip.commands.parser import CommandParser, leaf, positive, run_command
from evaclip.errors import UserError, unknown_name

_EXAMPLES = {
    "list": ["python -m benchmarks list", "python -m benchmarks list --device cuda"],
    "op": [
        "python -m benchmarks op layer_norm",
        "python -m benchmarks op layer_norm --shape 4096x768",
        "python -m benchmarks op rope_attention --shape 'eva02-l14@336 b4' --dtype bfloat16 --peer torch.compile",
        "python -m benchmarks op layer_norm --plugin my_norm.py --plot report/",
    ],
    "model": [
        "python -m benchmarks model --peer open_clip",
        "python -m benchmarks model clip_step --shape 'eva02-b16@224 b16 drop50' --mode training",
    ],
    "dropin": [
        "python -m benchmarks dropin --shape 'timm/vit-b b8' --mode training --peer none",
        "python -m benchmarks dropin --shape 'open_clip/vit-b-32 b32 t13'  # texts of 13 tokens, and padding",
    ],
    "all": [
        "python -m benchmarks all --json run.json --plot report/",
        "python -m benchmarks all --first 2 --dtype float32 --backend cpu --page docs/benchmarks.md",
    ],
    "overhead": ["python -m benchmarks overhead", "python -m benchmarks overhead --device cuda"],
    "search": ["python -m benchmarks search", "python -m benchmarks search --rows 100000 --approximate"],
    "serve": ["python -m benchmarks serve", "python -m benchmarks serve --model EVA02-CLIP-B-16 --seconds 30"],
    "infer": [
        "python -m benchmarks infer --model tiny --tower both --batch 1 8 --dtype fp32 int8 --rounds 20",
        "python -m benchmarks infer --engine evaclip onnxruntime openvino --pictures Pictures --json infer.json",
    ],
    "compare": ["python -m benchmarks compare before.json after.json"],
    "report": [
        "python -m benchmarks report run.json --out report/",
        "python -m benchmarks report old.json new.json --out beside/",
        "python -m benchmarks report run.json --page docs/benchmarks.md",
    ],
    "data": ["python -m benchmarks data --shards 20 --per-shard 2000 --json data.json --plot data.png"],
    "metadata": ["python -m benchmarks metadata", "python -m benchmarks metadata --ranks 8 --shards 1000"],
    "audit": [
        "python -m benchmarks audit layer_norm swiglu",
        "python -m benchmarks audit --kernels triton",
        "python -m benchmarks audit --explain rope_attention --arch sm_90",
        "python -m benchmarks audit token_dropout --shape 'eva02-l14@336 b8 drop50' --dtype bfloat16 --json audit.json",
    ],
}

_BOTH = "default: both"
_PAGE = "put the table of ours against the best peers into this Markdown page, and roofline.png beside it"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 on success, 1 for a regression or a broken error rule, 2 for wrong input."""
    return run_command(_build_parser(), argv)


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m benchmarks",
        description="Measure ops and models: time, memory, error, and the share of this machine's roofline.",
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=CommandParser)
    _add(verbs, "list", "show what can be measured here, and who is absent", _list)
    op = _add(verbs, "op", "measure one or more operations", _measure_named)
    op.add_argument("names", nargs="+", metavar="NAME", help="an operation, as `list` names them")
    model = _add(verbs, "model", "measure whole models", _measure_models)
    model.add_argument("names", nargs="*", metavar="NAME", help="encode_image, encode_text, clip_step (default: all)")
    dropin = _add(
        verbs, "dropin", "measure other people's models before and after evakernels.accelerate", _measure_dropin
    )
    everything = _add(verbs, "all", "measure everything", _measure_all)
    for verb in (op, model, dropin, everything):
        _add_measuring(verb)
    _add(verbs, "overhead", "measure what small calls cost the host, beside torch's own", _overhead)
    searching = _add(verbs, "search", "measure recall and time of searches in a store", _measure_search)
    searching.add_argument(
        "--rows", type=int, action="append", metavar="N", help="of the store, may be repeated (default: 10000, 1000000)"
    )
    searching.add_argument("--approximate", action="store_true", help="also by the approximate index, built first")
    serve = _add(verbs, "serve", "ask a server of embeddings from many clients at once", _serve)
    serve.add_argument("--model", default="tiny", help="with random weights (default: %(default)s)")
    serve.add_argument("--clients", type=int, default=50, metavar="N", help="default: %(default)s")
    serve.add_argument("--seconds", type=positive, default=60.0, metavar="S", help="default: %(default)g")
    _add_infer(_add(verbs, "infer", "measure a model's towers by engine: this library, PyTorch, ONNX runtimes", _infer))
    compare = _add(verbs, "compare", "find what became slower between two results", _compare)
    compare.add_argument("before", type=Path, help="a result of --json")
    compare.add_argument("after", type=Path, help="a result of --json")
    compare.add_argument(
        "--threshold", type=float, default=0.1, metavar="SHARE", help="changes that count (default: %(default)s)"
    )
    report = _add(verbs, "report", "write the pages and plots of a result, or several beside each other", _report)
    report.add_argument("results", type=Path, nargs="+", metavar="RESULT", help="of --json; several make one page")
    report.add_argument("--out", type=Path, metavar="FOLDER", help="where to")
    report.add_argument("--page", type=Path, metavar="FILE", help=_PAGE)
    data = _add(verbs, "data", "measure how fast shards are read, and how well their samples are mixed", _measure_data)
    _add_data(data)
    names = _add(
        verbs, "metadata", "measure checkpoints of many processes and lists of many shards, by names", _metadata
    )
    names.add_argument("--ranks", type=int, nargs="+", default=[144, 1024], metavar="N", help="default: 144 1024")
    names.add_argument("--shards", type=int, default=160_000, metavar="N", help="default: 160000")
    audit = _add(verbs, "audit", "count what the GPU kernels do, in their PTX", _audit)
    audit.add_argument("names", nargs="*", metavar="NAME", help="an audited operation (default: all)")
    audit.add_argument("--kernels", choices=["cuda", "triton"], help="of which language (default: both)")
    _add_choice(audit, " (default: a list for each)")
    audit.add_argument(
        "--arch", action="append", default=[], choices=["sm_80", "sm_90", "sm_100"], help="whose PTX (default: all)"
    )
    audit.add_argument("--explain", action="store_true", help="also the ten lines of the source that cost most")
    audit.add_argument("--json", type=_file, metavar="FILE", help="all that was counted")
    return parser


# Types of arguments: where nothing can be written is told before hours of measuring, not behind them.


def _file(text: str) -> Path:
    require_writable(Path(text))
    return Path(text)


def _folder(text: str) -> Path:
    require_writable(Path(text, "index.html"))
    return Path(text)


def _file_or_folder(text: str) -> Path:
    return _folder(text) if Path(text).is_dir() else _file(text)


def _add(verbs: Any, name: str, help: str, action: Any) -> argparse.ArgumentParser:
    parser = leaf(verbs, name, help=help, examples=_EXAMPLES[name])
    if name in ("list", "op", "model", "dropin", "all", "overhead"):
        parser.add_argument("--device", choices=sorted(DEFAULT_DTYPES), default="cpu", help="default: %(default)s")
        parser.add_argument("--plugin", type=Path, action="append", default=[], metavar="FILE", help="adds candidates")
        parser.add_argument(
            origin.FLAG,
            action="store_true",
            help="measure the evakernels that is installed, not this checkout's (default where that isn't compiled)",
        )
    parser.set_defaults(run=action)
    return parser


def _add_infer(parser: argparse.ArgumentParser) -> None:
    several: dict[str, Any] = {"nargs": "+"}
    parser.add_argument(
        "--model",
        default="EVA02-CLIP-B-16",
        help="NAME, with random weights, NAME:WEIGHTS or a run (default: %(default)s)",
    )
    parser.add_argument("--tower", choices=["image", "text", "both"], default="image", help="default: %(default)s")
    parser.add_argument("--batch", **several, type=int, default=[1, 8, 32], metavar="N", help="default: 1 8 32")
    dtypes = ("fp32", "bf16", "fp16", "int8")
    parser.add_argument("--dtype", **several, choices=dtypes, default=dtypes, help="of the weights (default: all)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--engine",
        **several,
        default=[],
        metavar="NAME",
        help="default: all; names with open_clip are those of its model with the same weights",
    )
    parser.add_argument("--device", choices=sorted(DEFAULT_DTYPES), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="photographs (default: those of installed packages)"
    )
    parser.add_argument("--json", type=_file_or_folder, metavar="FILE", help="all that was measured; a folder will do")


def _add_choice(parser: Any, shapes: str) -> None:
    several: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument("--shape", **several, metavar="NAME", help=f"such as 'eva02-l14@224 b8'{shapes}")
    parser.add_argument("--dtype", **several, choices=list(DTYPES), help="default: those usual on the device")


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to measure (each may be given several times)")
    several: dict[str, Any] = {"action": "append", "default": []}
    _add_choice(
        what,
        ", or sizes alone, such as 4096x768 for rows x channels; `list` tells the default shapes of each operation,"
        " and which sizes it has",
    )
    what.add_argument("--first", type=int, default=0, metavar="N", help="only so many of an operation's default shapes")
    what.add_argument("--mode", **several, choices=["forward", "training"], help=_BOTH)
    what.add_argument("--backend", **several, metavar="NAME", help="of this library (default: all)")
    what.add_argument("--peer", **several, metavar="NAME", help="default: all; 'none' for none")
    how = parser.add_argument_group("how")
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's own number)")
    how.add_argument(
        "--passes", type=int, default=Plan.passes, metavar="N", help="over all cases (default: %(default)s)"
    )
    how.add_argument(
        "--seconds",
        type=positive,
        default=Plan.seconds,
        metavar="S",
        help="a candidate and pass (default: %(default)s)",
    )
    how.add_argument("--profile", type=_folder, metavar="FOLDER", help="also leave a trace of each candidate there")
    how.add_argument("--check", action="store_true", help="exit 1 if an op of this library fails, or is wrong")
    results = parser.add_argument_group("what to leave")
    results.add_argument(
        "--json", type=_file_or_folder, metavar="FILE", help="everything, for `compare` and `report`; a folder will do"
    )
    results.add_argument("--plot", type=_folder, metavar="FOLDER", help="pages and plots")
    results.add_argument("--page", type=Path, metavar="FILE", help=_PAGE)


def _add_data(parser: argparse.ArgumentParser) -> None:
    from benchmarks.data.plans import RatePlan

    for name, text in (
        ("shards", "of random bytes, in a temporary folder"),
        ("per_shard", "samples"),
        ("image_bytes", "of each sample"),
        ("window", "samples that are mixed"),
        ("passes", "over the data; the median counts"),
    ):
        default = getattr(RatePlan, name)
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--json", type=_file, metavar="FILE", help="all that was measured")
    parser.add_argument("--plot", type=_file, metavar="FILE", help="a picture, such as data.png")


def _measure_data(args: argparse.Namespace) -> None:
    from benchmarks.data import machines, rate, shuffle
    from benchmarks.data.plans import RatePlan
    from benchmarks.data.show import DataResult, print_result, save_plot
    from benchmarks.machine import describe

    plan = RatePlan(**{name: getattr(args, name) for name in vars(RatePlan())})
    mixing, spread = shuffle.ShufflePlan(), machines.MachinesPlan()
    machine = describe(torch.device("cpu"), (), ("torch", "webdataset"))
    with tempfile.TemporaryDirectory() as folder:
        rates = rate.measure(plan, Path(folder), lambda line: print(line, file=sys.stderr, flush=True))
    result = DataResult(machine, plan, rates, mixing, shuffle.measure(mixing), spread, machines.measure(spread))
    if args.json:
        result.write_json(args.json)
    if args.plot:
        save_plot(result, args.plot)
    print_result(result)


def _metadata(args: argparse.Namespace) -> None:
    from benchmarks import metadata

    if min(*args.ranks, args.shards) < 1:
        raise UserError(f"--ranks and --shards are 1 or more, got {min(args.ranks)} and {args.shards}")
    metadata.show(args.ranks, args.shards)


def _list(args: argparse.Namespace) -> None:
    from benchmarks.table import print_operations

    _load(args)
    print_operations(list(operations().values()), args.device)


def _measure_named(args: argparse.Namespace) -> None:
    _load(args)
    _measure([get_operation(name) for name in args.names], args)


def _measure_models(args: argparse.Namespace) -> None:
    from benchmarks.cases.models import MODEL_OPERATIONS

    args.names = args.names or MODEL_OPERATIONS
    for name in args.names:
        if name not in MODEL_OPERATIONS:
            raise unknown_name("model operation", name, MODEL_OPERATIONS)
    _measure_named(args)


def _measure_dropin(args: argparse.Namespace) -> None:
    from benchmarks.cases.dropin import DROPIN

    # What the models do on the references is of no interest to anybody.
    args.backend = args.backend or [args.device]
    args.names = [DROPIN]
    _measure_named(args)


def _overhead(args: argparse.Namespace) -> None:
    from benchmarks import overhead

    _load(args)
    device = torch.device(args.device)
    overhead.show(overhead.measure(device), device)


def _measure_search(args: argparse.Namespace) -> None:
    from benchmarks import search

    found = []
    for rows in args.rows or [10_000, 1_000_000]:
        if rows < search.QUERIES:
            raise UserError(f"--rows must be at least {search.QUERIES}, got {rows}")
        with tempfile.TemporaryDirectory() as folder:
            say = partial(print, file=sys.stderr, flush=True)
            found += search.measure(Path(folder) / "store", rows, args.approximate, say)
    search.show(found)


def _serve(args: argparse.Namespace) -> None:
    from benchmarks import serve

    if args.clients < 1:
        raise UserError(f"--clients is 1 or more, got {args.clients}")
    serve.show(args.model, args.clients, serve.measure(args.model, args.clients, args.seconds))


def _infer(args: argparse.Namespace) -> None:
    from benchmarks import infer
    from benchmarks.engines import TOWERS

    towers = TOWERS if args.tower == "both" else (args.tower,)
    several = {"batches": tuple(args.batch), "dtypes": tuple(args.dtype), "engines": tuple(args.engine)}
    plan = infer.Plan(args.model, towers, **several, rounds=args.rounds, device=args.device, pictures=args.pictures)
    results = infer.measure(plan, partial(print, file=sys.stderr, flush=True))
    if args.json:
        results.write_json(args.json)
    infer.show(results)


def _measure_all(args: argparse.Namespace) -> None:
    _load(args)
    _measure(suite_operations(), args)


def _measure(chosen: list[Operation], args: argparse.Namespace) -> None:
    from benchmarks.table import print_table

    plan = _plan(args)
    if args.page:
        from benchmarks.report.markdown import split_page, write_section

        split_page(args.page)  # complains before minutes have gone by
    with _progress() as progress:
        results = run(chosen, plan, progress)
    if args.json:  # before anything is printed, whose reader may be gone
        results.write_json(args.json)
    print_table(results)
    if args.plot:
        print(_write_report(results, args.plot))
    if results.interrupted:
        raise KeyboardInterrupt  # a page keeps the whole table that it has
    if args.page:
        print(write_section(results, args.page))
    if args.profile:
        _profile(chosen, plan, results, args.profile)
    if args.check:
        _check(results)


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
    return Plan(args.device, **several, passes=args.passes, seconds=args.seconds, first=args.first)


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal, a line for every tenth elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _tell_tenths
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("measuring the machine")
        yield lambda done, total, title: bar.update(task, completed=done, total=total, description=title)


def _tell_tenths(done: int, total: int, title: str) -> None:
    if title and done * 10 // total != (done - 1) * 10 // total:
        print(f"{done:,} of {total:,} measurements done; next is {title}", file=sys.stderr, flush=True)


def _profile(chosen: list[Operation], plan: Plan, results: Results, folder: Path) -> None:
    from benchmarks.candidates import candidates
    from benchmarks.profiling import profile_case
    from benchmarks.suite import list_cases

    measured = {row.key for row in results.rows if row.failure is None}
    for case in list_cases(chosen, plan):
        for candidate in candidates(case.op, plan.device, plan.backends, plan.peers)[0]:
            if (*case.key, candidate.name) in measured:
                print(profile_case(case, candidate, folder))


def _check(results: Results) -> None:
    """The end of `--check`: exit code 1 if a row of this library failed or is wrong; peers that are wrong are named."""
    ours = [row for row in results.rows if row.kind == "ours" and row.failure]
    peers = [row for row in results.rows if row.kind != "ours" and row.mark == "wrong"]
    for title, rows in (("peers that are wrong", peers), ("evakernels fails or is wrong", ours)):
        if rows:
            print("\n".join([f"{title}:", *(f"{' '.join(row.key)}: {row.failure}" for row in rows)]))
    if ours:
        raise SystemExit(1)


def _compare(args: argparse.Namespace) -> None:
    from benchmarks.compare import compare, print_comparison

    comparison = compare(read_results(args.before), read_results(args.after), args.threshold)
    print_comparison(comparison)
    if comparison.regressions or comparison.shifts:
        raise SystemExit(1)


def _report(args: argparse.Namespace) -> None:
    from benchmarks.report.beside import write_beside
    from benchmarks.report.markdown import write_section

    if not (args.out or args.page):
        raise UserError("--out FOLDER or --page FILE is missing: where to write")
    names = [path.stem for path in args.results]
    if len(set(names)) < len(names):
        names = [f"{number}: {name}" for number, name in enumerate(names, start=1)]
    several = dict(zip(names, map(read_results, args.results), strict=True))
    first, *others = several.values()
    if args.page:
        if others:
            raise UserError(f"--page takes one result, got {len(args.results)}")
        print(write_section(first, args.page))
    if args.out:
        with writing(args.out):
            print(write_beside(several, args.out) if others else _write_report(first, args.out))


def _audit(args: argparse.Namespace) -> None:
    from benchmarks.audit import build, cases
    from benchmarks.audit.table import print_audit, write_json

    chosen = {kind: names for kind, names in cases.AUDITED.items() if args.kernels in (None, kind)}
    for name in args.names:
        if not any(name in names for names in chosen.values()):
            raise unknown_name("audited operation", name, {name for names in chosen.values() for name in names})
    counts = []
    for kind, known in chosen.items():
        names = [name for name in args.names or known if name in known]
        asked = cases.list_cases(names, args.shape, args.dtype, kind) if names else []
        for arch in build.ARCHS[kind] if asked else ():
            if not args.arch or arch in args.arch:
                counts += build.count_all(asked, arch, kind)
    if args.json:
        write_json(counts, args.json)
    print_audit(counts, explain=args.explain)


def _write_report(results: Results, folder: Path) -> Path:
    from benchmarks.report.page import write_report

    plugins.load()  # pages say what each operation does
    return write_report(results, folder)


def _load(args: argparse.Namespace) -> None:
    """Operations, peers and plugins; says which evakernels it is that can't be measured as it should."""
    if args.installed and origin.is_checkout():
        raise UserError(f"--installed: no evakernels is installed for {sys.executable}; pip install its wheel")
    plugins.load(args.plugin)
    if warning := origin.warning():
        print(f"warning: {warning}", file=sys.stderr)
