"""`evaclip index`: embeddings of images and captions, into a store to search in or a file."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from evaclip.commands.parser import add_reading, leaf, open_data, part_of_n
from evaclip.errors import UserError, counted
from evaclip.launchers import take_over

if TYPE_CHECKING:
    from evaclip.data import Source
    from evaclip.runtime.encoder import Encoder
    from evaclip.runtime.indexing import Progress
    from evaclip.runtime.store import Store

_NAMED_FAULTS = 3
_EXAMPLES = (
    "evaclip index photos.store --images ~/Photos --model EVA02-CLIP-B-16:merged2b_s8b_b131k",
    "evaclip index cc3m.store --images 'cc3m/{00000..00331}.tar' --model runs/b16 --thumbnails 128",
    "evaclip index photos.store --images ~/Photos --prune     # later: new, changed and deleted files",
    "evaclip index photos.store --images ~/Photos --part 0/2  # and 1/2 on another machine, then:",
    "evaclip index photos.store --add photos.store-0 photos.store-1",
    "evaclip index --npz queries.npz --texts queries.txt --model runs/b16",
)
_PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8")


def add_commands(subparsers: Any) -> None:
    """Add `index` to the command line."""
    help = "embed images into a store that 'evaclip search' reads; rows that it has already stay as they are"
    parser = leaf(subparsers, "index", _run, help=help, examples=_EXAMPLES)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("store", metavar="STORE", type=Path, nargs="?", help="folder of the store, made if it is new")
    add("--npz", metavar="FILE", type=Path, help="write the arrays 'ids' and 'embeddings' instead")
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--images", metavar="PATH", help="a folder of images, tar shards, or a table of paths: all that training reads")
    add("--texts", metavar="FILE", type=Path, help="for --npz: a text in each line, in UTF-8")
    add("--add", nargs="+", type=Path, metavar="OTHER", help="stores of the same model; STORE takes their rows")
    add_reading(parser, decoding=False)
    add, help = parser.add_argument, "small copies of this side, also of rows that have none yet (default: none)"
    add("--thumbnails", type=int, default=0, metavar="PIXELS", help=help)
    add("--prune", action="store_true", help="also remove rows of images deleted from the folder PATH")
    add("--approximate", action="store_true", help="also make an index for 'search --approximate'")
    add("--force", action="store_true", help="replace the file of --npz")
    help = "embed part I of N, from 0 on, into STORE-I (default: SLURM's task, if it started several)"
    add("--part", metavar="I/N", type=part_of_n, help=help)
    add = parser.add_argument_group("compute").add_argument
    add("--model", help="as for 'evaclip eval': NAME:WEIGHTS, a run, hf-hub:OWNER/NAME (default: the store's)")
    add("--device", default="auto", help="cpu, cuda, cuda:N (default: a GPU if there is one)")
    add("--precision", choices=_PRECISIONS, default="auto", help="default: auto, bf16 if the device has it, else fp32")
    add("--batch-size", type=int, metavar="N", help="images at once (default: 32, on a GPU 256)")
    add("--threads", type=int, metavar="N", help="threads that decode (default: one per core, 8 at most)")
    help = "keep each image's aspect ratio, in at most so many patches (default: the store's, or the model's size)"
    add("--max-patches", type=int, metavar="N", help=help)
    help = "ray: on the cluster at RAY_ADDRESS, each node of which must see the images; or on this machine"
    add("--engine", choices=tuple(_ENGINES), default="local", help=help)
    add("--workers", type=int, metavar="N", help="workers of ray (default: one per GPU or, without GPUs, one per node)")


def _run(args: argparse.Namespace) -> None:
    # Imported here so that `evaclip --help` doesn't wait for torch.
    take_over()
    if args.thumbnails < 0:
        raise UserError(f"--thumbnails must be 0 (none) or more, got {args.thumbnails}")
    if args.npz:
        return _write_arrays(args)
    _refuse(args, ("texts",), "--npz: a store holds images")
    store, advice = _added(args) if args.add else _indexed(args)
    if args.approximate:
        from evaclip.runtime.search import build_approximate

        build_approximate(store)
    print(f"{store.folder} has {counted(len(store), 'image')}: {advice}")


def _refuse(args: argparse.Namespace, names: Sequence[str], place: str) -> None:
    if given := [name for name in names if getattr(args, name)]:
        raise UserError(f"--{given[0]} is for {place}")


def _indexed(args: argparse.Namespace) -> tuple["Store", str]:
    """The store with the images of --images, and the command that comes next."""
    from evaclip.runtime.store import Store

    part = args.part or take_over()
    folder, advice = args.store, _search_of(args.store)
    if part[1] > 1:
        folder, name = args.store.with_name(f"{args.store.name}-{part[0]}"), quote(str(args.store))
        advice = f"when all parts are done, evaclip index {name} --add {name}-*"
    model = _lasting(args.model) if args.model else Store.exists(folder) and Store.open(folder).model["given"]
    if args.max_patches is None and Store.exists(folder):
        args.max_patches = Store.open(folder).model.get("max_patches")
    if not model:
        raise UserError(f"there is no store {str(folder)!r} yet: --model must name the model of its embeddings")
    source = open_data(_absolute(args.images), args, captions=False)
    gone = _gone(source, folder, args)  # which may refuse, before the work
    store = _ENGINES[args.engine](source, folder, str(model), part, args)
    if args.prune:
        print(f"removed {counted(store.remove(gone), 'row')} of deleted images")
    elif gone:
        print(f"{counted(len(gone), 'row')} of images deleted from {args.images}: --prune removes them")
    return store, advice


def _search_of(store: Path) -> str:
    return f"evaclip search {quote(str(store))} 'a red bicycle'"


def _gone(source: "Source", folder: Path, args: argparse.Namespace) -> list[str]:
    """Ids of the store's rows of images that were deleted from this folder."""
    from evaclip.data.image_folder import FolderSource
    from evaclip.runtime.indexing import empty_folders, gone
    from evaclip.runtime.store import Store

    if not isinstance(source, FolderSource):
        if args.prune:
            raise UserError(f"--prune removes rows of images deleted from a folder, which {args.images} is not")
        return []
    if not Store.exists(folder):
        return []
    root = Path(source.description)
    with Store.open(folder) as store:
        found = gone(root, store)
    if args.prune and (empty := empty_folders(root, found)):
        raise UserError(
            f"{empty[0]} is empty, and the store has rows of images in it: mount the missing disk, or delete the "
            "folder; nothing was removed"
        )
    return found


def _index_here(source: "Source", folder: Path, model: str, part: tuple[int, int], args: argparse.Namespace) -> "Store":
    from evaclip.runtime.indexing import UNREADABLE_FILE, Progress, index

    _refuse(args, ("workers",), "--engine ray; several machines embed parts, with --part")
    encoder, (number, count) = _encoder(model, args), part
    store = _ready_store(folder, model, encoder)
    progress = Progress(len(source) * (number + 1) // count - len(source) * number // count)
    with _shown(progress):
        index(source, encoder, store, thumbnail=args.thumbnails, part=part, progress=progress)
    _tell(progress, store.folder / UNREADABLE_FILE.format(number))
    return store


def _index_on_ray(
    source: "Source", folder: Path, model: str, part: tuple[int, int], args: argparse.Namespace
) -> "Store":
    from evaclip.loading import LoadedModel
    from evaclip.runtime.encoder import Encoder, chosen_precision
    from evaclip.runtime.indexing import UNREADABLE_FILE, Progress
    from evaclip.runtime.ray_engine import connected, index_on_ray

    if part[1] > 1:
        raise UserError("--engine ray shares the work itself: run it once, without --part")
    with connected(args.device, args.workers) as cluster:
        precision = chosen_precision(args.precision, cluster.device)
        # Here it says what the store is of; the workers have copies.
        here = _encoder(model, args, device="cpu", precision=precision)
        loaded = LoadedModel(here.name, here.origin, here.model, here.tokenizer, here.transform)
        encoder = partial(Encoder, loaded, precision=precision, **_options(args))
        store, progress = _ready_store(folder, model, here), Progress(len(source))
        with _shown(progress):
            index_on_ray(source, encoder, store, cluster, thumbnail=args.thumbnails, progress=progress)
    _tell(progress, store.folder / UNREADABLE_FILE.format(0))
    return store


_ENGINES = {"local": _index_here, "ray": _index_on_ray}


def _added(args: argparse.Namespace) -> tuple["Store", str]:
    """The store with the rows of the stores of --add, and the command that comes next."""
    from evaclip.runtime.store import Store
    from evaclip.runtime.text import copy_text_tower

    _refuse(args, ("model", "thumbnails", "workers", "prune", "part"), "--images, not for --add")
    others = [Store.open(folder) for folder in args.add]
    store = Store.open(args.store) if Store.exists(args.store) else Store.create(args.store, others[0].model)
    for other in others:
        taken = store.merge(other)
        copy_text_tower(other, store)
        print(f"{other.folder}: {counted(taken, 'row')} added, {len(other) - taken:,} there before")
    return store, _search_of(args.store)


def _ready_store(folder: Path, model: str, encoder: "Encoder") -> "Store":
    """The store, which is made if there is none, with the text tower that a killed command may have left out."""
    from evaclip.runtime.indexing import describe
    from evaclip.runtime.store import Store
    from evaclip.runtime.text import has_text_tower, save_text_tower

    described = {"given": model, **describe(encoder)}
    is_new = not Store.exists(folder)
    if is_new:
        try:
            Store.create(folder, described)
        except UserError:
            if not Store.exists(folder):  # another command may have made it meanwhile
                raise
    store = Store.open(folder)
    store.require_model(described)
    if not has_text_tower(store):
        try:
            save_text_tower(store, encoder.model)
            if not is_new:
                print(f"added the missing text tower to {folder}")
        except UserError as exc:
            print(f"searches will take seconds longer, for torch and the whole model: {exc}")
    return store


def _write_arrays(args: argparse.Namespace) -> None:
    import numpy as np

    from evaclip.atomic import replacing, writing
    from evaclip.outputs import check_output

    _refuse(args, ("add", "part", "prune", "approximate", "thumbnails"), "a STORE, not for --npz")
    if not args.model:
        raise UserError("--npz needs --model, the model of the embeddings")
    if args.npz.suffix != ".npz":
        raise UserError(f"--npz must be a file that ends in .npz, got {str(args.npz)!r}")
    check_output(args.npz, overwrite=args.force)
    ids, embeddings = _embedded_texts(args) if args.texts else _embedded_images(args)
    with writing(args.npz), replacing(args.npz) as temporary, temporary.open("wb") as stream:
        np.savez(stream, ids=np.array(ids), embeddings=embeddings)
    print(f"wrote {args.npz}: {embeddings.shape[0]:,} x {embeddings.shape[1]:,}")


def _embedded_texts(args: argparse.Namespace) -> tuple[list[str], Any]:
    from evaclip.atomic import reading

    with reading(args.texts):
        # Not splitlines: a line separator of Unicode may be in a text. Editors under Windows begin files with a BOM.
        texts = args.texts.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    texts = [] if texts == [""] else texts
    return texts, _encoder(args.model, args).texts(texts).numpy()


def _embedded_images(args: argparse.Namespace) -> tuple[list[str], Any]:
    from evaclip.runtime.indexing import Progress, embedded, join

    source = open_data(_absolute(args.images), args, captions=False)
    encoder, progress = _encoder(args.model, args), Progress(len(source))
    with _shown(progress):
        rows, embeddings = join(embedded(source, encoder, progress), encoder.dim)
    _tell(progress)
    return [row.id for row in rows], embeddings


def _encoder(model: str, args: argparse.Namespace, **otherwise: Any) -> "Encoder":
    import torch

    from evaclip.runtime.encoder import Encoder

    device = args.device
    if device == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"  # each of SLURM's tasks has its own
    return Encoder(model, **{"device": device, "precision": args.precision, **_options(args), **otherwise})


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {"batch_size": args.batch_size, "threads": args.threads, "max_patches": args.max_patches}


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
        f" {progress.seconds:.0f} s: {progress.rate:,.1f} images/s, encoder busy {progress.busy:.0%}"
    )
    for fault in progress.faults[:_NAMED_FAULTS]:
        print(f"  {fault}")
    if len(progress.faults) > _NAMED_FAULTS and listed is not None:
        print(f"  ... all of them: {listed}")
