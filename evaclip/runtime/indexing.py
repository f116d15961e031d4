"""From images to a store of their embeddings: each once, whatever ended the work before."""

import hashlib
import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

from evaclip.atomic import write_text, writing
from evaclip.data import BadSample, Fault, RawSample, Source
from evaclip.data.samples import UPRIGHT, decode_image
from evaclip.runtime.encoder import Encoder, prefetch
from evaclip.runtime.store import Row, Store
from evaclip.weights.files import weights_hash

Array = np.ndarray[Any, np.dtype[np.float32]]
Batches = Iterator[tuple[list[Row], Array]]
"""Rows with their embeddings, float32 `[n, dim]`."""

UNREADABLE_FILE = "unreadable-{}.jsonl"
_ROWS, _SECONDS = 4096, 30.0
"""Embeddings are written when there are so many, or after this time; that much work a crash can cost."""
_THREADS = 4
"""That make small copies of images which aren't embedded."""


@dataclass
class Progress:
    """Counts of images so far.

    Attributes:
        seen: images that were looked at, of `total`.
        embedded, unchanged: images that were embedded, and images that the store had with the same content.
        faults: why images couldn't be read.
        waited, seconds: in which the encoder had nothing to do, and in all.
    """

    total: int
    embedded: int = 0
    unchanged: int = 0
    faults: list[Fault] = field(default_factory=list)
    waited: float = 0.0
    seconds: float = 0.0

    @property
    def seen(self) -> int:
        return self.embedded + self.unchanged + len(self.faults)

    @property
    def rate(self) -> float:
        """Images that are embedded in a second."""
        return self.embedded / self.seconds if self.seconds else 0.0

    @property
    def busy(self) -> float:
        """The share of the time in which the encoder computed."""
        return 1 - self.waited / self.seconds if self.seconds else 0.0


def index(
    source: Source,
    encoder: Encoder,
    store: Store,
    *,
    thumbnail: int = 0,
    part: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> Progress:
    """Embeds the images of a source that the store doesn't have, or has with another content.

    Threads of the encoder read and hash the files. A file whose size and time are those in the store isn't read again.
    What has been embedded is in the store at the latest 30 seconds later; a run that is ended goes on there. Images
    that can't be read are listed in the store's `unreadable-N.jsonl`, N being the part, with the reasons.

    Args:
        source: opened with `captions=False`, unless samples without a caption are to be left out.
        encoder: of the store's model.
        store: which is written.
        thumbnail: side in pixels of small copies that the store keeps, also of images that it has without one; 0 for
            none.
        part: which part of how many this process does; several may write into one store at a time.
        progress: is kept up to date, for who wants to show it.

    Raises:
        UserError: if the store can't be written, or the model gives NaN.
    """
    numbers = _numbers(source, part)
    progress = progress or Progress(len(numbers))
    work = Work(source, store.states(), thumbnail)
    keep(work.embedded(add_thumbnails(work, store, numbers, progress), encoder, progress), store)
    list_faults(source, store, progress, part[0])
    return progress


def embedded(source: Source, encoder: Encoder, progress: Progress) -> Batches:
    """The rows of all images of a source that can be read, with their embeddings, float32 `[n, dim]`."""
    yield from Work(source).embedded(range(len(source)), encoder, progress)
    progress.faults += source.faults


def join(batches: Batches, dim: int) -> tuple[list[Row], Array]:
    """All rows, and their embeddings float32 `[n, dim]`."""
    rows, embeddings = list[Row](), [np.empty((0, dim), np.float32)]
    for more, of_them in batches:
        rows += more
        embeddings.append(of_them)
    return rows, np.concatenate(embeddings)


def gone(root: Path, store: Store) -> list[str]:
    """Ids of the rows of deleted images below a folder; an image counts as there if its state is unknown."""
    inside = f"{str(root).rstrip('/')}/"
    return [id for id in store.contents() if id.startswith(inside) and not any(map(_is_there, _files_of(id)))]


def empty_folders(root: Path, ids: Iterable[str]) -> list[Path]:
    """Empty folders below `root` that files of these names, which are gone, were in: disks that aren't mounted leave
    such."""
    parents = {next(parent for parent in Path(id).parents if _is_there(str(parent))) for id in ids} - {root}
    return sorted(folder for folder in parents if folder.is_dir() and not os.listdir(folder))  # noqa: PTH208


def _files_of(id: str) -> Iterator[str]:
    """Possible files of a row: the whole id, or the shard before a key."""
    parts = id.split(":")
    return (":".join(parts[:count]) for count in range(len(parts), 0, -1))


def _is_there(path: str) -> bool:
    # Path.exists is False also without permission and for a server that doesn't answer.
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass
    return True


def describe(encoder: Encoder) -> dict[str, Any]:
    """Settings that embeddings depend on."""
    native = {} if encoder.max_patches is None else {"max_patches": encoder.max_patches}
    return {
        "name": encoder.name,
        "weights": weights_hash(encoder.model),
        "precision": encoder.precision,
        "dim": encoder.dim,
        **native,
    }


@dataclass
class _Job:
    """An image on its way.

    Attributes:
        id: of its row.
        numbers: the samples that share it, each with its captions.
        raw: the first sample; None if `read` is to read it.
        content, stamp, captions, small: of the row.
    """

    id: str
    numbers: list[int]
    raw: RawSample | BadSample | None = None
    content: str = ""
    stamp: str = ""
    captions: tuple[str, ...] = ()
    small: bytes | None = None

    def read(self, source: Source, known: tuple[str, str]) -> bool:
        """Read and hash the image unless it has the known content and stamp; returns whether the content is new.

        Raises:
            BadSample: it can't be read.
        """
        first, *others = self.numbers
        self.stamp = _stamp(source.file(first))  # before it is read, so that a change in the meantime is noticed
        if self.stamp and self.stamp == known[1]:
            return False
        if isinstance(self.raw, BadSample):
            raise self.raw
        self.raw = self.raw or source[first]
        self.content = hashlib.sha256(self.raw.image).hexdigest()
        captions = (*self.raw.captions, *(caption for number in others for caption in source.captions(number)))
        self.captions = tuple(dict.fromkeys(captions))
        return self.content != known[0]

    def image(self, source: Source, thumbnail: int) -> Image.Image:
        """Decode what `read` has read, and make the small copy."""
        assert isinstance(self.raw, RawSample)
        image = decode_image(self.raw.image, source.name(self.numbers[0]), UPRIGHT)
        if thumbnail:
            self.small = small_copy(image, thumbnail)
        return image

    def row(self) -> Row:
        """The row of an image that has been read."""
        first, *others = self.captions or ("",)
        metadata = {"captions": [first, *others]} if others else {}
        return Row(self.id, self.content, first, metadata, self.small, self.stamp)


def _stamp(file: Path | None) -> str:
    """Size and time of a file; "" without one, or if it can't be read."""
    with suppress(OSError):
        if file is not None:
            state = file.stat()
            return f"{state.st_size} {state.st_mtime_ns}"
    return ""


def _numbers(source: Source, part: tuple[int, int]) -> range:
    """The samples of one part of several: those of a shard are in one, but for the first and the last."""
    number, count = part
    return range(len(source) * number // count, len(source) * (number + 1) // count)


@dataclass(frozen=True)
class Work:
    """The images of a source that differ from the content of the same id in `known`.

    Attributes:
        source: of the images.
        known: content and stamp of a store's rows by id.
        thumbnail: side in pixels of small copies that rows get; 0 for none.
    """

    source: Source
    known: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    thumbnail: int = 0

    def embedded(self, numbers: Iterable[int], encoder: Encoder, progress: Progress) -> Batches:
        """The rows of those samples that are to be embedded and can be."""
        began, counting = time.monotonic(), Lock()

        def changed(job: _Job) -> Image.Image | None:
            is_new = job.read(self.source, self.known.get(job.id, ("", "")))
            with counting:
                progress.unchanged += len(job.numbers) - is_new
            return job.image(self.source, self.thumbnail) if is_new else None

        for part in encoder.stream(self.jobs(numbers), changed):
            progress.embedded += len(part.items)
            progress.faults += part.faults
            progress.waited += part.waited
            progress.seconds = time.monotonic() - began
            yield [job.row() for job in part.items], part.embeddings.numpy()

    def id(self, number: int) -> str:
        """Of the row of a sample."""
        file = self.source.file(number)
        return self.source.name(number) if file is None else str(file)

    def jobs(self, numbers: Iterable[int]) -> Iterator[_Job]:
        """A job for each image. Threads read files; samples in shards are read here, one after the other."""
        groups = ((self.id(number), [number]) for number in numbers)
        if self.source.pictures() is not None:  # a table may name an image with each of its captions
            shared: dict[str, list[int]] = {}
            for id, (number,) in groups:
                shared.setdefault(id, []).append(number)
            groups = (each for each in shared.items())
        for id, group in groups:
            job = _Job(id, group)
            if self.source.file(group[0]) is None:
                try:
                    job.raw = self.source[group[0]]
                except BadSample as exc:
                    job.raw = exc
            yield job


def add_thumbnails(work: Work, store: Store, numbers: Sequence[int], progress: Progress) -> Sequence[int]:
    """Makes the small copies that unchanged images of the store lack, without embedding these again.

    Returns:
        The numbers of the other samples.
    """
    lacking = store.without_thumbnail() if work.thumbnail else {}
    if not lacking:
        return numbers
    others, rows = list[int](), list[Row]()

    def made(job: _Job) -> tuple[_Job, bool]:
        is_made = False
        with suppress(BadSample):
            is_made = job.id in lacking and not job.read(work.source, (lacking[job.id], ""))
            if is_made:
                job.image(work.source, work.thumbnail)
        return job, is_made

    for job, is_made in prefetch(work.jobs(numbers), made, threads=_THREADS, depth=16 * _THREADS):
        if not is_made:
            others += job.numbers
            continue
        rows.append(job.row())
        progress.unchanged += len(job.numbers)
        if len(rows) == _ROWS:
            store.add_thumbnails(rows)
            rows.clear()
    store.add_thumbnails(rows)
    return others


def keep(batches: Batches, store: Store) -> None:
    """Writes batches as they come, many at once; of rows with the same id, the first."""
    rows, embeddings, written, ids = list[Row](), list[Array](), time.monotonic(), set[str]()
    for more, of_them in batches:
        new = [place for place, row in enumerate(more) if row.id not in ids]
        rows += [more[place] for place in new]
        embeddings.append(of_them[new])
        ids.update(row.id for row in more)
        if len(rows) >= _ROWS or (rows and time.monotonic() - written >= _SECONDS):
            store.add(np.concatenate(embeddings), rows)
            rows, embeddings, written = [], [], time.monotonic()
    if rows:
        store.add(np.concatenate(embeddings), rows)


def list_faults(source: Source, store: Store, progress: Progress, number: int = 0) -> None:
    """Adds the source's faults and writes the list of all faults into the store."""
    progress.faults += source.faults
    faults = [{"name": f.name, "what": f.kind, "detail": f.detail} for f in progress.faults]
    path = store.folder / UNREADABLE_FILE.format(number)
    with writing(path):
        write_text(path, "".join(f"{json.dumps(fault, ensure_ascii=False)}\n" for fault in faults))


def small_copy(image: Image.Image, side: int) -> bytes:
    """The image with its longer side cut down to `side` pixels, as a WebP file."""
    small = image.convert("RGBA" if image.has_transparency_data else "RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    # Method 2 takes half of the time that the default, 4, takes, for an eighth more bytes.
    small.save(buffer, "WEBP", quality=80, method=2)
    return buffer.getvalue()
