"""`evaclip index` and `evaclip embed`: embeddings of pictures and texts, into a store to search in or a file."""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaclip.commands.parser import leaf
from evaclip.data.kinds import KINDS
from evaclip.errors import UserError

if TYPE_CHECKING:
    from evaclip.data import Source
    from evaclip.runtime.encoder import Encoder
    from evaclip.runtime.indexing import Progress
    from evaclip.runtime.store import Store

_NAMED_FAULTS = 3
_PATIENCE = 600.0
"""Seconds in which the first process is to have loaded its model."""
_IMAGES = "a folder of pictures, tar shards, or a table of paths: all that training reads"


def add_commands(subparsers: Any) -> None:
    """Adds `index` and `embed` to the command line."""
    _add_index(subparsers)
    _add_embed(subparsers)


def _add_index(subparsers: Any) -> None:
    parser = leaf(
        subparsers,
        "index",
        help="embed pictures into a store that 'evaclip search' looks into; what is in it already is left as it is",
        examples=[
            "evaclip index photos.store --images ~/Pictures --model EVA02-CLIP-B-16:merged2b_s8b_b131k",
            "evaclip index cc3m.store --images 'cc3m/{00000..00331}.tar' --model runs/b16 --thumbnails 128",
            "evaclip index photos.store --images ~/Pictures     # later: what is new or changed, by the same model",
        ],
    )
    parser.add_argument("store", metavar="STORE", type=Path, help="folder of the store, which is made if there is none")
    parser.add_argument("--images", required=True, metavar="PATH", help=_IMAGES)
    _add_keys(parser)
    parser.add_argument(
        "--thumbnails", type=int, default=0, metavar="PIXELS", help="keep small copies of this side (default: none)"
    )
    parser.add_argument("--approximate", action="store_true", help="make what 'search --approximate' looks into, too")
    _add_model(parser, "of a store that exists, by default its own")
    parser.set_defaults(run=_run_index)


def _add_embed(subparsers: Any) -> None:
    parser = leaf(
        subparsers,
        "embed",
        help="write embeddings of pictures or texts into a file: .npz with the arrays 'ids' and 'embeddings'",
        examples=[
            "evaclip embed photos.npz --images ~/Pictures --model EVA02-CLIP-B-16:merged2b_s8b_b131k",
            "evaclip embed queries.npz --texts queries.txt --model runs/b16",
        ],
    )
    parser.add_argument("target", metavar="OUT", type=Path, help="the file, .npz")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--images", metavar="PATH", help=_IMAGES)
    given.add_argument("--texts", metavar="FILE", type=Path, help="a text in each line, in UTF-8")
    _add_keys(parser)
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    _add_model(parser, "")
    parser.set_defaults(run=_run_embed)


def _add_keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", choices=KINDS, default="auto", help="of the data (default: guessed)")
    parser.add_argument("--image-key", metavar="KEY", help="column of a table, or suffix in shards, of the pictures")
    parser.add_argument("--caption-key", metavar="KEY", help="the same of captions, which may be missing in shards")


def _add_model(parser: argparse.ArgumentParser, default: str) -> None:
    compute = parser.add_argument_group("compute")
    more = f"; {default}" if default else ""
    compute.add_argument(
        "--model",
        required=not default,
        help=f"NAME:WEIGHTS, a run, a checkpoint, hf-hub:OWNER/NAME, as for 'evaclip eval'{more}",
    )
    compute.add_argument("--device", default="auto", help="cpu, cuda, cuda:N (default: a GPU if there is one)")
    compute.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="default: what the device has"
    )
    compute.add_argument("--batch-size", type=int, metavar="N", help="pictures at once (default: 32, on a GPU 256)")
    compute.add_argument("--threads", type=int, metavar="N", help="that decode (default: one a core, 8 at most)")
    compute.add_argument("--compile", action="store_true", help="let torch.compile make the code, which takes minutes")


def _run_index(args: argparse.Namespace) -> None:
    # Imported here so that `evaclip --help` doesn't wait for torch.
    from evaclip.runtime.indexing import UNREADABLE_FILE, Progress, describe, index
    from evaclip.runtime.store import Store

    if args.thumbnails < 0:
        raise UserError(f"the side of thumbnails must be 0 (none) or more, got {args.thumbnails}")
    part = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    store = Store.open(args.store) if Store.exists(args.store) else None
    model = _lasting(args.model) if args.model else store and str(store.model["given"])
    if not model:
        raise UserError(f"there is no store {str(args.store)!r} yet: --model says whose embeddings it is to hold")
    source = _open(args.images, args)
    encoder = _encoder(model, args)
    described = {"given": model, **describe(encoder)}
    if store is None and part[0] > 0:
        store = _awaited(args.store)
    elif store is None:
        store = Store.create(args.store, described)
        _keep_text_tower(store, encoder)
    # The same weights may lie elsewhere now.
    store.require_model({**described, "given": store.model["given"]})
    progress = Progress(len(source) * (part[0] + 1) // part[1] - len(source) * part[0] // part[1])
    with _shown(progress):
        index(source, encoder, store, thumbnail=args.thumbnails, part=part, progress=progress)
    _tell(progress, store.folder / UNREADABLE_FILE.format(part[0]))
    if args.approximate:
        from evaclip.runtime.approximate import build_approximate

        build_approximate(store)
    print(f"{args.store} has {len(store):,} pictures: evaclip search {args.store} 'a red bicycle'")


def _awaited(folder: Path) -> "Store":
    """The store that the first of several processes makes."""
    from evaclip.runtime.store import Store

    end = time.monotonic() + _PATIENCE
    while not Store.exists(folder):
        if time.monotonic() > end:
            raise UserError(f"the first process has made no store {str(folder)!r} within {_PATIENCE:g} seconds")
        time.sleep(0.2)
    return Store.open(folder)


def _keep_text_tower(store: "Store", encoder: "Encoder") -> None:
    from evaclip.runtime.text import save_text_tower

    try:
        save_text_tower(store, encoder.model)
    except UserError as exc:
        print(f"searches will take seconds longer, for torch and the whole model: {exc}")


def _run_embed(args: argparse.Namespace) -> None:
    import numpy as np

    from evaclip.atomic import replacing, writing
    from evaclip.outputs import check_output

    if args.target.suffix != ".npz":
        raise UserError(f"{str(args.target)!r} can't be written; expected .npz")
    check_output(args.target, overwrite=args.force)
    ids, embeddings = _embedded_texts(args) if args.texts else _embedded_pictures(args)
    with writing(args.target), replacing(args.target) as temporary, temporary.open("wb") as stream:
        np.savez(stream, ids=np.array(ids), embeddings=embeddings)
    print(f"wrote {args.target}: {embeddings.shape[0]:,} x {embeddings.shape[1]:,}")


def _embedded_texts(args: argparse.Namespace) -> tuple[list[str], Any]:
    try:
        texts = args.texts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise UserError(f"cannot read {args.texts}: {exc}") from exc
    return texts, _encoder(args.model, args).texts(texts).numpy()


def _embedded_pictures(args: argparse.Namespace) -> tuple[list[str], Any]:
    import numpy as np

    from evaclip.runtime.indexing import Progress, embedded

    source = _open(args.images, args)
    encoder, progress = _encoder(args.model, args), Progress(len(source))
    ids, parts = list[str](), [np.empty((0, encoder.dim), np.float32)]
    with _shown(progress):
        for rows, embeddings in embedded(source, encoder, progress):
            ids += [row.id for row in rows]
            parts.append(embeddings)
    _tell(progress)
    return ids, np.concatenate(parts)


def _open(path: str, args: argparse.Namespace) -> "Source":
    from evaclip.data import open_source

    return open_source(
        _absolute(path), args.kind, image_key=args.image_key, caption_key=args.caption_key, captions=False
    )


def _encoder(model: str, args: argparse.Namespace) -> "Encoder":
    import torch

    from evaclip.loading import RANDOM
    from evaclip.runtime.encoder import Encoder

    options = {"batch_size": args.batch_size, "threads": args.threads, "compile": args.compile}
    device = args.device
    if device == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"  # each process has its own
    encoder = Encoder(model, device=device, precision=args.precision, **options)
    if encoder.origin == RANDOM:
        raise UserError(f"the model {model!r} has random weights, whose embeddings find nothing: give NAME:WEIGHTS")
    return encoder


def _absolute(path: str) -> str:
    """The same data from any folder: names of local files become whole paths; URLs and commands stay."""
    # No Path.resolve, as it may be a pattern.
    return "::".join(part if ":" in part else os.path.abspath(Path(part).expanduser()) for part in path.split("::"))  # noqa: PTH100


def _lasting(model: str) -> str:
    """The same model from any folder."""
    name, colon, weights = model.partition(":")
    if Path(model).expanduser().is_dir():
        return str(Path(model).expanduser().resolve())
    return f"{name}:{Path(weights).expanduser().resolve()}" if colon and Path(weights).expanduser().exists() else model


@contextmanager
def _shown(progress: "Progress") -> Iterator[None]:
    """Shows a line that keeps up with `progress`, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TimeRemainingColumn
    from rich.progress import Progress as Display
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            display.update(line, completed=progress.seen)
            return Text(f"{progress.rate:,.1f}/s, encoder busy {progress.busy:.0%}")

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Display(*columns, console=console, transient=True, disable=not console.is_terminal) as display:
        line = display.add_task("", total=progress.total)
        yield


def _tell(progress: "Progress", listed: Path | None = None) -> None:
    print(
        f"{progress.embedded:,} embedded, {progress.unchanged:,} unchanged, {len(progress.faults):,} unreadable in"
        f" {progress.seconds:.0f} s: {progress.rate:,.1f} pictures/s, encoder busy {progress.busy:.0%}"
    )
    for fault in progress.faults[:_NAMED_FAULTS]:
        print(f"  {fault}")
    if len(progress.faults) > _NAMED_FAULTS and listed is not None:
        print(f"  ... all of them: {listed}")
