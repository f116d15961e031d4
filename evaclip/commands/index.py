"""`evaclip index` and `evaclip embed`: embeddings of pictures and texts, into a store to search in or a file."""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from evaclip.commands.parser import leaf
from evaclip.commands.reading import add_reading, open_data
from evaclip.errors import UserError
from evaclip.slurm import take_over
from evaclip.words import counted

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
            "evaclip index photos.store --images ~/Pictures --prune",
            "evaclip index photos.store --merge photos.store-0 photos.store-1    # what two machines have embedded",
        ],
    )
    parser.add_argument("store", metavar="STORE", type=Path, help="folder of the store, which is made if there is none")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--images", metavar="PATH", help=_IMAGES)
    given.add_argument(
        "--merge", nargs="+", type=Path, metavar="OTHER", help="stores of the same model, whose rows STORE takes"
    )
    add_reading(parser, decoding=False)
    parser.add_argument(
        "--thumbnails",
        type=int,
        default=0,
        metavar="PIXELS",
        help="keep small copies of this side, also of what STORE has without one (default: none)",
    )
    parser.add_argument(
        "--prune", action="store_true", help="also remove the rows of pictures that are gone from the folder PATH"
    )
    parser.add_argument("--approximate", action="store_true", help="also make an index by faiss for 'search --approximate'")
    compute = _add_model(parser, "of a store that exists, by default its own")
    compute.add_argument(
        "--engine",
        choices=tuple(_ENGINES),
        default="local",
        help="ray: on the cluster that RAY_ADDRESS names, each node of which must see the pictures; or on this machine",
    )
    compute.add_argument(
        "--workers", type=int, metavar="N", help="of ray (default: one a GPU or, if there is none, one a node)"
    )
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
    add_reading(parser, decoding=False)
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    _add_model(parser, "")
    parser.set_defaults(run=_run_embed)


def _add_model(parser: argparse.ArgumentParser, default: str) -> Any:
    compute = parser.add_argument_group("compute")
    more = f"; {default}" if default else ""
    compute.add_argument(
        "--model",
        required=not default,
        help=f"NAME:WEIGHTS, a run, a checkpoint, hf-hub:OWNER/NAME, as for 'evaclip eval'{more}",
    )
    compute.add_argument("--device", default="auto", help="cpu, cuda, cuda:N (default: a GPU if there is one)")
    compute.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16", "int8"),
        default="auto",
        help="default: what the device has",
    )
    compute.add_argument("--batch-size", type=int, metavar="N", help="pictures at once (default: 32, on a GPU 256)")
    compute.add_argument("--threads", type=int, metavar="N", help="that decode (default: one a core, 8 at most)")
    compute.add_argument("--compile", action="store_true", help="let torch.compile make the code, which takes minutes")
    return compute


def _run_index(args: argparse.Namespace) -> None:
    # Imported here so that `evaclip --help` doesn't wait for torch.
    from evaclip.runtime.store import Store

    take_over()
    if args.merge:
        store, told = _merged(args), _search_of(args.store)
    else:
        if args.thumbnails < 0:
            raise UserError(f"the side of thumbnails must be 0 (none) or more, got {args.thumbnails}")
        folder, told = _node_folder(args.store)
        model = _lasting(args.model) if args.model else Store.exists(folder) and Store.open(folder).model["given"]
        if not model:
            raise UserError(f"there is no store {str(folder)!r} yet: --model says whose embeddings it is to hold")
        source = open_data(_absolute(args.images), args, captions=False)
        gone = _gone(source, folder, args)  # which may refuse, before the work
        store = _ENGINES[args.engine](source, folder, str(model), args)
        if args.prune and _is_first(folder, args):
            print(f"removed {counted(store.remove(gone), 'row')} of pictures that are gone")
        elif gone:
            print(f"{counted(len(gone), 'row')} of pictures that are gone from {args.images}: --prune removes them")
    if args.approximate:
        from evaclip.runtime.approximate import build_approximate

        build_approximate(store)
    print(f"{store.folder} has {counted(len(store), 'picture')}: {told}")


def _node_folder(store: Path) -> tuple[Path, str]:
    """The store that this process writes, and the command that comes next."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if on_node == size:
        return store, _search_of(store)
    # Processes of several machines can't rely on one lock.
    node = os.environ.get("GROUP_RANK", int(os.environ["RANK"]) // on_node)
    name = quote(str(store))
    return store.with_name(f"{store.name}-{node}"), f"when all are done, evaclip index {name} --merge {name}-*"


def _search_of(store: Path) -> str:
    return f"evaclip search {quote(str(store))} 'a red bicycle'"


def _is_first(folder: Path, args: argparse.Namespace) -> bool:
    """Whether this process makes the store; where there are several machines, each has one."""
    return (int(os.environ.get("RANK", "0")) if folder == args.store else _local_rank()) == 0


def _gone(source: "Source", folder: Path, args: argparse.Namespace) -> list[str]:
    """Ids of the store's rows whose pictures, of this folder, are no longer there."""
    from evaclip.data.image_folder import PictureFolder
    from evaclip.runtime.indexing import empty_folders, gone
    from evaclip.runtime.store import Store

    if not isinstance(source, PictureFolder):
        if args.prune:
            raise UserError(f"--prune looks for what is gone from a folder of pictures, which {args.images} is not")
        return []
    if not (Store.exists(folder) and _is_first(folder, args)):
        return []
    root = Path(source.description)
    with Store.open(folder) as store:
        found = gone(root, store)
    if args.prune and (empty := empty_folders(root, found)):
        raise UserError(
            f"{empty[0]} is empty, and the store has rows of pictures in it: mount what belongs there, or delete the "
            "folder; nothing was removed"
        )
    return found


def _index_here(source: "Source", folder: Path, model: str, args: argparse.Namespace) -> "Store":
    from evaclip.runtime.indexing import UNREADABLE_FILE, Progress, index

    if args.workers is not None:
        raise UserError("--workers is for --engine ray; here torchrun --nproc-per-node starts several processes")
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    encoder = _encoder(model, args)
    store = _ready_store(folder, model, encoder, first=_is_first(folder, args))
    progress = Progress(len(source) * (rank + 1) // size - len(source) * rank // size)
    with _shown(progress):
        index(source, encoder, store, thumbnail=args.thumbnails, part=(rank, size), progress=progress)
    _tell(progress, store.folder / UNREADABLE_FILE.format(rank))
    return store


def _index_on_ray(source: "Source", folder: Path, model: str, args: argparse.Namespace) -> "Store":
    from evaclip.loading import LoadedModel
    from evaclip.runtime.encoder import Encoder, chosen_precision
    from evaclip.runtime.indexing import UNREADABLE_FILE, Progress
    from evaclip.runtime.ray_engine import connected, index_on_ray

    if "WORLD_SIZE" in os.environ:
        raise UserError("--engine ray starts its processes itself: run it without torchrun")
    with connected(args.device, args.workers) as cluster:
        precision = chosen_precision(args.precision, cluster.device)
        # Here it says what the store is of; the workers have copies.
        here = _encoder(model, args, device="cpu", precision=precision, compile=False)
        loaded = LoadedModel(here.name, here.origin, here.model, here.tokenizer, here.transform)
        encoder = partial(Encoder, loaded, precision=precision, **_options(args))
        store, progress = _ready_store(folder, model, here), Progress(len(source))
        with _shown(progress):
            index_on_ray(source, encoder, store, cluster, thumbnail=args.thumbnails, progress=progress)
    _tell(progress, store.folder / UNREADABLE_FILE.format(0))
    return store


_ENGINES = {"local": _index_here, "ray": _index_on_ray}


def _merged(args: argparse.Namespace) -> "Store":
    from evaclip.runtime.store import Store
    from evaclip.runtime.text import copy_text_tower

    if unused := [name for name in ("model", "thumbnails", "workers", "prune") if getattr(args, name)]:
        raise UserError(f"--merge takes rows as they are: --{unused[0]} is for --images")
    others = [Store.open(folder) for folder in args.merge]
    store = Store.open(args.store) if Store.exists(args.store) else Store.create(args.store, others[0].model)
    for other in others:
        taken = store.merge(other)
        copy_text_tower(other, store)
        print(f"{other.folder}: {counted(taken, 'row')} taken, {len(other) - taken:,} there before")
    return store


def _ready_store(folder: Path, model: str, encoder: "Encoder", *, first: bool = True) -> "Store":
    """The store, which is made if there is none; by the first of several processes."""
    from evaclip.runtime.indexing import describe
    from evaclip.runtime.store import Store

    described = {"given": model, **describe(encoder)}
    if not Store.exists(folder) and first:
        try:
            _keep_text_tower(Store.create(folder, described), encoder)
        except UserError:
            if not Store.exists(folder):  # another command may have made it meanwhile
                raise
    store = _awaited(folder)
    store.require_model(described)
    return store


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
        # Not splitlines: a line separator of Unicode may be in a text. Editors under Windows begin files with a BOM.
        texts = args.texts.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise UserError(f"cannot read {args.texts}: {getattr(exc, 'strerror', None) or exc}") from exc
    texts = [] if texts == [""] else texts
    return texts, _encoder(args.model, args).texts(texts).numpy()


def _embedded_pictures(args: argparse.Namespace) -> tuple[list[str], Any]:
    import numpy as np

    from evaclip.runtime.indexing import Progress, embedded

    source = open_data(_absolute(args.images), args, captions=False)
    encoder, progress = _encoder(args.model, args), Progress(len(source))
    ids, parts = list[str](), [np.empty((0, encoder.dim), np.float32)]
    with _shown(progress):
        for rows, embeddings in embedded(source, encoder, progress):
            ids += [row.id for row in rows]
            parts.append(embeddings)
    _tell(progress)
    return ids, np.concatenate(parts)


def _encoder(model: str, args: argparse.Namespace, **otherwise: Any) -> "Encoder":
    import torch

    from evaclip.runtime.encoder import Encoder

    device = args.device
    if device == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{_local_rank()}"  # each process has its own
    return Encoder(model, **{"device": device, "precision": args.precision, **_options(args), **otherwise})


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {"batch_size": args.batch_size, "threads": args.threads, "compile": args.compile}


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _absolute(path: str) -> str:
    """The same data from any folder: names of local files become whole paths; URLs and commands stay."""
    from evaclip.data.remote import is_remote

    # No Path.resolve, as it may be a pattern.
    return "::".join(part if is_remote(part) else os.path.abspath(Path(part).expanduser()) for part in path.split("::"))  # noqa: PTH100


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
