"""Content of the server's responses: embeddings, rows of the store, labels and thumbnails."""

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fastapi import UploadFile
from numpy.typing import NDArray
from pydantic import BaseModel

from evaclip.data.samples import BadSample, Decoding, decode_image, read_image_file
from evaclip.errors import UserError
from evaclip.pixels import open_image
from evaclip.runtime.encoder import Encoder
from evaclip.runtime.indexing import small_copy
from evaclip.runtime.search import search
from evaclip.runtime.store import Row, Store
from evaclip.serve.batching import Batcher, QueueFull
from evaclip.serve.limits import FORMATS, Limits, Rejected, check_texts, decode

T = TypeVar("T")
Vector = NDArray[np.float32]

_SIDE, _KEPT = 256, 2048
"""Pixels of a small copy's longer side, and how many of them are kept."""


class Query(BaseModel, extra="forbid"):
    """The query: the direction of the sum of the given parts minus the parts of `minus`."""

    text: str = ""
    image: UploadFile | None = None
    minus: str = ""
    like: int | None = None
    top: int = 10
    filter: str = ""


class Hit(BaseModel):
    """A row of the store, its cosine with the query, and where a small copy of its image is."""

    row: int
    score: float
    id: str
    caption: str
    metadata: dict[str, Any]
    thumbnail: str


class Hits(BaseModel):
    """The best first."""

    results: list[Hit]
    seconds: float


class Service:
    """The work behind the API. One thread has the encoder, another one the store, and some decode images.

    Raises:
        Rejected: by all methods, for what isn't accepted.
    """

    def __init__(
        self, store: Store, encoder: Encoder, limits: Limits, delay: float, observe: Callable[[str, int], None]
    ) -> None:
        self.store, self.encoder, self.limits = store, encoder, limits
        self.batcher = Batcher(
            {"picture": lambda p: list(encoder.images(p).numpy()), "text": lambda t: list(encoder.texts(t).numpy())},
            size=encoder.batch_size,
            delay=delay,
            depth=limits.waiting,
            observe=observe,
        )
        self._scale, bias = float(encoder.model.logit_scale.exp()), encoder.model.logit_bias
        self._bias = None if bias is None else bias.item()
        self._decoders = ThreadPoolExecutor(encoder.threads, "evaclip-decode")
        self._reader = ThreadPoolExecutor(1, "evaclip-store")
        self._small = lru_cache(_KEPT)(_small_copy_of_file)

    def close(self) -> None:
        """Ends the threads."""
        self.batcher.close()
        self._decoders.shutdown(cancel_futures=True)
        self._reader.shutdown(cancel_futures=True)

    async def images(self, files: Sequence[bytes]) -> Vector:
        """Embeddings `[n, dim]` of image files."""
        if len(files) > self.limits.images:
            raise Rejected(422, f"There are {len(files):,} images; send {self.limits.images:,} at most.")
        pixels = await _all(_in(self._decoders, partial(self._pixels, data)) for data in files)
        return await self._embeddings("picture", pixels)

    async def texts(self, texts: Sequence[str]) -> Vector:
        """Embeddings `[n, dim]` of texts."""
        check_texts(texts, self.limits)
        return await self._embeddings("text", texts)

    async def label(self, file: bytes, labels: Sequence[str], template: str) -> list[float]:
        """The probability of each label by the model, for one of them to be right; of a model with SigLIP's bias that
        of each label by itself."""
        if "{}" not in template:
            raise Rejected(422, f"The template {template!r} has no place for the label; write {{}} there.")
        check_texts([template, *labels], self.limits)
        (image,), texts = await _all(
            (self.images([file]), self.texts([template.replace("{}", label) for label in labels]))
        )
        logits = self._scale * (texts @ image).astype(np.float64)
        if self._bias is not None:
            return [float(share) for share in 1 / (1 + np.exp(-logits - self._bias))]
        weights = np.exp(logits - logits.max())
        return [float(weight) for weight in weights / weights.sum()]

    async def search(self, query: Query) -> list[Hit]:
        """The rows of the store that are nearest to a query, the best first."""
        if not 1 <= query.top <= self.limits.top:
            raise Rejected(422, f"'top' is {query.top}; send 1 to {self.limits.top:,}.")
        check_texts([query.text, query.minus, query.filter], self.limits)
        texts = {name: text for name in ("text", "minus") if (text := getattr(query, name).strip())}
        files = [] if query.image is None else [await query.image.read()]
        if "text" not in texts and not files and query.like is None:
            raise Rejected(422, "There is nothing to look for; send a text, an image or the number of a row.")
        embedded, images = await _all((self.texts(list(texts.values())), self.images(files)))
        signs = np.array([-1 if name == "minus" else 1 for name in texts], np.float32)
        vector = images.sum(axis=0) + signs @ embedded
        return await _in(self._reader, partial(self._search, vector, query))

    async def count(self) -> int:
        """Rows that the store has now."""
        await _in(self._reader, self.store.refresh)
        return len(self.store)

    async def thumbnail(self, number: int, content: str = "") -> tuple[bytes, str]:
        """A thumbnail of a row's image with a hash that begins with `content`, and its media type."""
        row = (await _in(self._reader, partial(self._rows, [number])))[0]
        if not row.content.startswith(content):
            raise _changed()
        data = row.thumbnail or await _in(self._decoders, partial(self._small, row.id, row.content))
        try:
            image = open_image(data or b"", formats=FORMATS)
            return data or b"", image.get_format_mimetype() or ""
        except Exception as exc:
            raise Rejected(404, f"There is no image of row {number} to show.") from exc

    async def _embeddings(self, kind: str, items: Sequence[Any]) -> Vector:
        try:
            futures = self.batcher.submit(kind, items)
        except QueueFull as exc:
            raise Rejected(503, "The server has too much to do; try again in a second.") from exc
        found = await _all(asyncio.wrap_future(future) for future in futures)
        return np.stack(found) if found else np.empty((0, self.store.dim), np.float32)

    def _pixels(self, data: bytes) -> Any:
        return self.encoder.transform(decode(data, self.limits))

    def _search(self, vector: Vector, query: Query) -> list[Hit]:
        self.store.refresh()
        if query.like is not None:
            self._rows([query.like])
            vector = vector + self.store.embeddings[query.like].astype(np.float32)
        try:
            # One more, as the row itself is left out.
            found = search(self.store, vector, query.top + 1, query.filter.strip() or None)
        except (UserError, sqlite3.Error) as exc:
            raise Rejected(422, f"The search can't be made: {exc}.") from exc
        pairs = [pair for pair in zip(*(part.tolist() for part in found), strict=True) if pair[1] != query.like]
        rows = self._rows([number for _, number in pairs[: query.top]])
        return [_hit(score, number, row) for (score, number), row in zip(pairs, rows, strict=False)]

    def _rows(self, numbers: Sequence[int]) -> list[Row]:
        for number in numbers:
            if not 0 <= number < self.store.slots:
                raise Rejected(404, f"There is no row {number}.")
        try:
            return self.store.rows(numbers)
        except UserError as exc:
            self.store.refresh()
            raise _changed() from exc


def _changed() -> Rejected:
    return Rejected(404, "The store has changed, and this row is no longer there; search again.")


def _hit(score: float, number: int, row: Row) -> Hit:
    # The content distinguishes images that have had the same row number.
    address = f"/thumbnail/{number}?v={row.content[:16]}"
    metadata = dict(row.metadata)
    return Hit(row=number, score=score, thumbnail=address, id=row.id, caption=row.caption, metadata=metadata)


def _small_copy_of_file(id: str, content: str) -> bytes | None:
    """A small copy of a row's image, if it is a file; `content` is in the cache's key for a changed file."""
    path = Path(id)
    try:
        if not (path.is_absolute() and path.is_file()):
            return None
        image = decode_image(read_image_file(path), id, Decoding(exif_orientation=True, at_least=_SIDE))
        return small_copy(image, _SIDE)
    except (BadSample, OSError, ValueError):
        return None


async def _in(pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, work)


async def _all(parts: Any) -> list[Any]:
    """The results of all; where one fails, or nobody waits any more, the others are cancelled."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
