"""`evaclip data`: build the emoji shards, list shards, convert and check data sets."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from evaclip.commands.parser import add_reading, leaf, open_data, part_of_n
from evaclip.errors import UserError, counted
from evaclip.launchers import take_over

_STYLES = ("twemoji", "openmoji")
_NAMED_FAULTS = 5


def add_commands(subparsers: Any) -> None:
    """Adds `data` with its verbs to the command line."""
    parser = subparsers.add_parser("data", help="build, list, convert and check data sets")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_emoji(verbs)
    _add_index(verbs)
    _add_convert(verbs)
    _add_check(verbs)


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
