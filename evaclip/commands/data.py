"""`evaclip data`: build the emoji shards, list shards, convert, check and time data sets."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from evaclip.commands.parser import add_reading, leaf, open_data, part_of_n, positive
from evaclip.errors import UserError, counted
from evaclip.launchers import take_over

_STYLES = ("twemoji", "openmoji")
_NAMED_FAULTS = 5


def add_commands(subparsers: Any) -> None:
    """Adds `data` with its verbs to the command line."""
    parser = subparsers.add_parser("data", help="build, convert, check and time data sets")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_emoji(verbs)
    _add_index(verbs)
    _add_convert(verbs)
    _add_check(verbs)
    _add_bench(verbs)


def _add_emoji(verbs: Any) -> None:
    parser = leaf(
        verbs,
        "emoji",
        help="build shards of captioned emoji pictures from installed packages",
        examples=["evaclip data emoji data/emoji", "evaclip data emoji data/emoji --style twemoji --skin-tones"],
        extra="demo",
    )
    parser.add_argument("out", metavar="OUT", help="folder that the shards are written to")
    parser.add_argument("--style", choices=(*_STYLES, "both"), default="both", help="default: both")
    parser.add_argument("--size", type=int, default=96, help="side of the pictures in pixels (default: 96)")
    parser.add_argument("--skin-tones", action="store_true", help="include the skin-tone variants")
    parser.set_defaults(run=_run_emoji)


def _add_index(verbs: Any) -> None:
    parser = leaf(
        verbs,
        "index",
        help="read the headers of all shards once and write a list, from which any machine opens them at once",
        examples=[
            "evaclip data index 's3://bucket/cc3m/{00000..00331}.tar' --out cc3m.json",
            "evaclip train eva02-b-16 --set data.train=cc3m.json",
            "evaclip data index 'laion/{000000..159999}.tar' --out laion.json --part 3/64   # one of 64 machines",
            "evaclip data index 'laion-*.json' --out laion.json                             # all their lists as one",
        ],
    )
    parser.add_argument("path", metavar="PATH", help="tar shards, or lists of them to be joined")
    parser.add_argument("--out", required=True, metavar="FILE", help="the list, a .json file")
    parser.add_argument(
        "--part",
        metavar="I/N",
        type=part_of_n,
        help="index the I-th of N parts of the shards, from 0, into FILE-0000I-of-0000N.json; under torchrun and srun"
        " each process takes one",
    )
    parser.set_defaults(run=_run_index)


def _add_convert(verbs: Any) -> None:
    parser = leaf(
        verbs,
        "convert",
        help="write class folders, a table or other shards as tar shards",
        examples=[
            "evaclip data convert imagenet/train shards/",
            "evaclip data convert pairs.csv shards/ --samples-per-shard 5000",
            "evaclip train tiny --set data.train=shards/",
        ],
    )
    parser.add_argument("path", metavar="SOURCE", help="class folders, a table, tar shards, or the word synthetic")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder that the shards are written to, without others")
    add_reading(parser, decoding=False)
    _add_separator(parser)
    parser.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N", help="default: %(default)s")
    parser.set_defaults(run=_run_convert)


def _add_check(verbs: Any) -> None:
    parser = leaf(
        verbs,
        "check",
        help="read every sample and list faults; exit code 1 if there are any",
        examples=[
            "evaclip data check 'data/emoji/twemoji-{00000..00003}.tar'",
            "evaclip data check pairs.csv --json faults.json",
        ],
    )
    _add_source_options(parser)
    parser.add_argument("--all", action="store_true", help="name all faults, not the first few of each kind")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything here, each fault with its file, key and index"
    )
    parser.set_defaults(run=_run_check)


def _add_bench(verbs: Any) -> None:
    parser = leaf(
        verbs,
        "bench",
        help="measure how fast batches are read, decoded and augmented, and say how many cores a node needs",
        examples=[
            "evaclip data bench 'data/cc3m/{00000..00331}.tar' --workers 8 --batch-size 256",
            "evaclip data bench 'data/cc3m/{00000..00331}.tar' --images-per-second 2600",
        ],
    )
    _add_source_options(parser)
    add = parser.add_argument
    add("--batch-size", type=int, default=64, help="samples per batch (default: 64)")
    add("--image-size", type=int, default=224, help="side of the tensors (default: 224)")
    add("--seconds", type=positive, default=10.0, help="how long to measure (default: 10)")
    add("--images-per-second", type=positive, metavar="N", help="rate of a GPU, measured or from 'evaclip plan'")
    add("--gpus", type=int, default=8, metavar="N", help="GPUs of a node (default: 8)")
    parser.set_defaults(run=_run_bench)


def _add_separator(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv-separator", help="default: tab, comma, semicolon or pipe, whichever gives the columns")


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="tar shards, a table, a folder, or the word synthetic")
    add_reading(parser)
    _add_separator(parser)
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )


def _run_emoji(args: argparse.Namespace) -> None:
    from rich.console import Console

    from evaclip.atomic import require_writable, writing
    from evaclip.demo import emoji

    styles = _STYLES if args.style == "both" else (args.style,)
    folder = Path(args.out)
    began = time.perf_counter()
    require_writable(folder / "LICENSES")
    with writing(folder):
        shards = emoji.build_emoji(folder, styles, args.size, args.skin_tones)
    console = Console()
    for style, paths in shards.items():
        console.print(
            f"{style}: {counted(len(paths), 'shard')} {folder}/{style}-*.tar", soft_wrap=True, highlight=False
        )
    console.print(f"done in {time.perf_counter() - began:.1f} s; the licences are in {folder / 'LICENSES'}")


def _run_index(args: argparse.Namespace) -> None:
    from evaclip.atomic import require_writable, writing
    from evaclip.data.opening import index_shards
    from evaclip.data.shard_list import LIST_SUFFIX, write_list

    if not args.out.endswith(LIST_SUFFIX):
        raise UserError(f"--out must end in {LIST_SUFFIX}, got {args.out!r}")
    part, parts = args.part or take_over()
    out = Path(args.out)
    if parts > 1:
        out = out.with_stem(f"{out.stem}-{part:05d}-of-{parts:05d}")
    require_writable(out)
    source = index_shards(args.path, part, parts)
    for fault in source.faults:
        print(fault)
    with writing(out):
        write_list(out, source.shards)
    found = f"{counted(len(source.shards), 'shard')}, {counted(len(source), 'sample')}"
    print(f"{out}: {found}, fingerprint {source.fingerprint}")


def _run_convert(args: argparse.Namespace) -> None:
    from rich.console import Console

    from evaclip.atomic import require_writable, writing
    from evaclip.data.shard_writer import convert
    from evaclip.data.webdataset import IMAGE_KEY

    out: Path = args.out
    require_writable(out / "classes.txt")
    with writing(out):
        source = open_data(args.path, args)
        shards, suffixes, faults = convert(source, out, args.samples_per_shard, Console(stderr=True))
    print(f"{out}: {counted(shards, 'shard')}, {counted(suffixes.total(), 'sample')}")
    if bad := faults.counts.total():
        print(f"left out: {counted(bad, 'bad sample')}; `evaclip data check` lists them")
    if set(suffixes) - set(IMAGE_KEY.split(";")):
        print(f"set data.image_key='{';'.join(sorted(suffixes))}' to read these shards")


def _run_check(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from evaclip.atomic import require_writable
    from evaclip.data.check import check

    if args.json:
        require_writable(args.json)
    source = open_data(args.path, args)
    console = Console()
    report = check(source, args.workers, console)
    size = report.image_bytes / 1e6
    console.print(f"{source.description}: {counted(report.samples, 'sample')}, {size:.1f} MB of images", soft_wrap=True)
    console.print(f"fingerprint {source.fingerprint}")
    for note in source.notes:
        console.print(note, soft_wrap=True, highlight=False)
    for kind, count in report.converted.items():
        console.print(f"converted: {kind} pixels of {counted(count, 'image')}, to 8 bits")
    if args.json:
        report.save(args.json)
    if not report.faults:
        console.print("no faults")
        return
    table = Table("fault", "count", "all of them" if args.all else "the first of them")
    for kind, faults in report.faults.items():
        lines = "\n".join(
            str(fault).removeprefix(f"{kind}: ") for fault in faults[: None if args.all else _NAMED_FAULTS]
        )
        table.add_row(kind, str(len(faults)), escape(lines))
    console.print(table)
    raise SystemExit(1)


def _run_bench(args: argparse.Namespace) -> None:
    from dataclasses import replace
    from math import ceil

    from rich.console import Console
    from rich.table import Table

    from evaclip.data.bench import time_loader, time_stages
    from evaclip.data.samples import REDUCTION_MARGIN
    from evaclip.transforms import TrainTransform

    for name in ("image_size", "gpus"):
        if (given := getattr(args, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, got {given}")
    rate: float | None = args.images_per_second
    began = time.perf_counter()
    source = open_data(args.path, args)
    opened = time.perf_counter() - began
    transform = TrainTransform(args.image_size).levels
    step_seconds = args.batch_size / rate if rate else 0.0
    throughput = time_loader(source, transform, args.batch_size, args.workers, step_seconds, args.seconds)
    reduced = replace(source.decoding, at_least=REDUCTION_MARGIN * args.image_size)
    stages = {
        name: time_stages(source, transform, decoding)
        for name, decoding in (("whole", source.decoding), ("jpeg_reduction", reduced))
    }
    columns = ["decoding", "read, ms", "decode, ms", "transform, ms", "images/s a core"]
    if rate:
        columns.append(f"cores for {args.gpus} GPUs of {rate:,.0f} images/s")
    table = Table(*columns)
    for name, times in stages.items():
        cores = [f"{ceil(args.gpus * rate / times.per_second):,}"] if rate else []
        table.add_row(name, *(f"{value:.2f}" for value in times[:3]), f"{times.per_second:.0f}", *cores)
    console = Console()
    console.print(table)
    shared = throughput.shared_bytes
    table = Table(show_header=False)
    for name, value in {
        "workers": str(args.workers),
        "batch size": str(args.batch_size),
        "samples/s": f"{throughput.samples_per_second:.0f}",
        "MB/s": f"{throughput.samples_per_second * stages['whole'].image_bytes / 1e6:.1f}",
        "waiting": f"{throughput.waited:.0%}",
        "first batch, s": f"{throughput.first_batch_seconds:.2f}",
        "opening, s": f"{opened:.2f}",
        "shared memory, MB": "" if shared is None else f"{shared / 1e6:,.0f}",
    }.items():
        table.add_row(name, value)
    console.print(table)
