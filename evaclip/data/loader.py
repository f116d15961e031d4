"""Batches for training, an endless stream with one integer as its position, and batches for evaluation."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from evaclip.data.config import DEFAULT_WINDOW
from evaclip.data.mixture import MixedOrder, MixtureSource
from evaclip.data.order import I64, U64, SampleOrder, mix, rows_by_node, sample_order
from evaclip.data.remote import Prefetcher
from evaclip.data.samples import BadSample, Fault, FaultLog, RawSample, decode_image
from evaclip.data.source import Source
from evaclip.data.workers import WorkerLoader, WorkerOptions
from evaclip.errors import UserError
from evaclip.packing import PackedImages

TrainTransform = Callable[[Image.Image, int], Tensor | PackedImages]
"""(image, seed) -> float32 or uint8 [3, H, W], or one packed image; a pure function of both."""
Targets = Callable[[list[str], U64], Tensor]
"""(n captions, n seeds) -> [n, ...]: tokens, labels or masks to be learnt; a pure function of
each sample's own caption and seed."""

EvalTransform = Callable[[Image.Image], Tensor | PackedImages]
"""image -> float32 or uint8 [3, H, W], or one packed image."""

UNIT = 64
"""Most samples that a worker reads at a time."""
_ATTEMPTS = 100
_KEPT_BYTES = 2**26
_NEARBY = 50
_REPLACEMENT, _CAPTION, _AUGMENTATION, _TARGET = 1, 2, 3, 4


class Rows:
    """Tensors `[n_i, ...]`, or packed images, that stand for their concatenation `[sum of n_i, ...]`.

    Pinned pieces stay pinned: they are joined on the device.
    """

    def __init__(self, pieces: Sequence[Any]) -> None:
        self.pieces = pieces

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def __getitem__(self, rows: slice) -> "Rows":
        """Some of the rows, which must follow one another."""
        start, stop, _ = rows.indices(len(self))
        chosen = []
        for piece in self.pieces:
            if start < len(piece) and stop > 0:
                chosen.append(piece[max(start, 0) : stop])
            start, stop = start - len(piece), stop - len(piece)
        return Rows(chosen)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Any:
        """All rows in one tensor, or packed, on that device."""
        first, *others = self.pieces
        if not others:
            return first.to(device, non_blocking=non_blocking)
        if isinstance(first, PackedImages):
            return PackedImages.concatenate([piece.to(device, non_blocking=non_blocking) for piece in self.pieces])
        whole = first.new_empty((len(self), *first.shape[1:]), device=device)
        for piece, rows in zip(self.pieces, whole.split([len(piece) for piece in self.pieces]), strict=True):
            rows.copy_(piece, non_blocking=non_blocking)
        return whole


def packed_pieces(images: Tensor | PackedImages | Rows) -> list[PackedImages]:
    """The packed images of a batch, in pieces; empty if the batch is a tensor."""
    pieces = images.pieces if isinstance(images, Rows) else [images]
    return [piece for piece in pieces if isinstance(piece, PackedImages)]


@dataclass(frozen=True)
class Batch:
    """One rank's rows of a global batch.

    Attributes:
        images: [rows, 3, H, W] or packed, the results of the transform; in pieces if they are pinned.
        targets: [rows, ...], see Targets.
        position: samples that all ranks have consumed after this batch; `batches(position)` continues there.
        skipped: rows of this batch whose sample was bad and was replaced, once each.
    """

    images: Tensor | PackedImages | Rows
    targets: Tensor
    position: int
    skipped: int


class TrainLoader:
    """Endless shuffled batches of a source, decoded and augmented by worker processes.

    The global batch at position p holds the samples with the global indices [p, p + batch_size), sorted by canonical
    node; rank r gets the rows of `rank_rows`. Samples, order, captions and augmentation of a batch depend on
    seed and position only. Epochs have no gap between them, so a batch can hold the end of one and the start of the
    next. A bad sample is logged and replaced by one that its global index determines. The next remote shards are
    prefetched.

    Args:
        source: the indexed samples.
        batch_size: samples of a global batch, over all ranks.
        transform: see TrainTransform; its seed is a hash of `seed` and the global index.
        targets: see Targets; a sample with several captions gives one at random.
        seed: of everything random.
        workers: processes that read and decode; 0 does it in the calling process.
        rank, world_size: this rank and the number of ranks.
        window: samples that the shuffle mixes with one another; 0 mixes all.
        nodes: groups that the shards are divided among, see `sample_order`; machines, in general.
        machine: ranks of this machine, which share its copies of remote shards; None: this rank only.
        prefetch: batches that are ready ahead, over all workers, or as many units a worker, if these are more.
        pin: return `images` in pinned pieces, for copies to a GPU.
        decode_size: a large JPEG may be decoded at a fraction of its size as long as both sides keep this
            many pixels; None always decodes it whole.
        patience: seconds without a batch after which a warning is logged.
        together: rows of a global batch that stay on one rank, see `rank_rows`.

    Raises:
        UserError: the source has fewer samples than one global batch, or a number is out of range.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        transform: TrainTransform,
        targets: Targets,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        window: int = DEFAULT_WINDOW,
        nodes: int = 1,
        machine: range | None = None,
        prefetch: int = 2,
        pin: bool = False,
        decode_size: int | None = None,
        patience: float = 60.0,
        together: int = 1,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {batch_size}")
        if batch_size < world_size:
            raise UserError(f"batch_size must be {world_size} or more, a sample for each rank, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size), got rank {rank} of {world_size}")
        if window < 0:
            raise UserError(f"data.shuffle_window must be 0 (everything) or more, got {window}")
        if nodes < 1 or batch_size % nodes:
            raise UserError(
                f"batch_size must be a multiple of data.canonical_nodes={nodes}, 1 or more, got {batch_size}"
            )
        if len(source) < batch_size:
            raise UserError(
                f"{source.description}: {len(source)} samples are too few for one global batch of {batch_size};"
                " use a smaller batch size"
            )
        self.faults = FaultLog()
        self.faults.add(source.faults)
        self._source = source
        self._batch_size = batch_size
        self._rows = rank_rows(batch_size, rank, world_size, together)
        self._units = _units(len(self._rows))
        self._seed = seed
        self._decoding = replace(source.decoding, at_least=decode_size)
        held = max(prefetch, -(-prefetch * len(self._units) // max(workers, 1)))
        self._options = WorkerOptions(workers, held, pin, patience)
        if isinstance(source, MixtureSource):
            self._order: SampleOrder | MixedOrder = source.order(seed, window, nodes)
        else:
            self._order = sample_order(len(source), seed, window, source.shard_sizes, nodes)
        self._prefetcher = Prefetcher()
        self._decoded = dict[int, tuple[RawSample, Image.Image]]()
        self._ordered: tuple[int, I64] | None = None
        self.set_transform(transform, targets)
        if source.remote:
            ranks = [rank_rows(batch_size, each, world_size, together) for each in machine or [rank]]
            self._require_room(range(ranks[0].start, ranks[-1].stop), window, len(ranks))

    def set_transform(self, transform: TrainTransform, targets: Targets) -> None:
        """Sets the transform and targets of later calls of `batches`. Order and random draws stay the same."""
        self._transform, self._targets = transform, targets

    def batches(self, position: int = 0) -> Generator[Batch, None, None]:
        """The batches from a position on, endlessly; any position that a batch reported, at any world size,
        will do.

        Closing the iterator ends the workers. Raises UserError if a whole row of replacements is bad too,
        RuntimeError if a worker process dies.
        """
        if position < 0:
            raise ValueError(f"position must be 0 or more, got {position}")
        starts = count(position, self._batch_size)
        units = ((start, rows) for start in starts for rows in self._units)
        read = partial(self._read, self._transform, self._targets)
        loaded = iter(WorkerLoader(read, units, self._options))
        for end in count(position + self._batch_size, self._batch_size):
            images, targets, faults, replaced = zip(*islice(loaded, len(self._units)), strict=True)
            self.faults.add(list(chain.from_iterable(faults)))
            rows = Rows(images)
            yield Batch(rows if self._options.pin else rows.to("cpu"), torch.cat(targets), end, sum(replaced))

    def _require_room(self, rows: range, window: int, ranks: int) -> None:
        """Raises UserError if the cache is too small for the remote shards that a machine reads at the same time."""
        shards = self._source.remote_shards(self._order.shards(self._in_order(0, rows))[0])
        size = sum(shard.size for shard in shards)
        if shards and size > (capacity := shards[0].cache.capacity):
            readers = f", which {ranks} processes of this machine read," if ranks > 1 else ""
            raise UserError(
                f"a shuffle window of {window} samples (0: all){readers} takes {len(shards)} remote shards,"
                f" {size / 1e9:.3g} GB, but local copies may take {capacity / 1e9:.3g} GB: raise data.remote.cache_gb,"
                " to twice as much for the next window to be fetched meanwhile, or lower data.shuffle_window"
            )

    def _read(
        self, transform: TrainTransform, targets: Targets, unit: tuple[int, slice]
    ) -> tuple[Tensor | PackedImages, Tensor, list[Fault], int]:
        """Images [rows, 3, H, W] or packed, targets [rows, ...], the faults of all attempts, and replaced rows."""
        position, rows = unit
        if self._ordered is None or self._ordered[0] != position:
            # A worker reads several units of a batch.
            self._ordered = position, self._in_order(position, self._rows)
        global_indices = self._ordered[1][rows]
        if self._source.remote:
            now, after = self._order.shards(global_indices)
            self._prefetcher.want(self._source.remote_shards([*now, *after]))
        samples = self._order.indices(global_indices)
        caption_draws = mix(self._seed, _CAPTION, global_indices)
        seeds = mix(self._seed, _AUGMENTATION, global_indices) >> np.uint64(1)
        images, captions, keys, faults, replaced = list[Any](), list[str](), list[str](), list[Fault](), 0
        for slot, sample in enumerate(samples.tolist()):
            attempts = len(faults)
            raw, image = self._load(sample, int(global_indices[slot]), faults)
            replaced += len(faults) > attempts
            keys.append(raw.key)
            captions.append(raw.captions[int(caption_draws[slot]) % len(raw.captions)] if raw.captions else "")
            try:
                images.append(transform(image, int(seeds[slot])))
            except Exception as exc:
                exc.add_note(f"while transforming {raw.key} of {self._source.description}")
                raise
        try:
            return _join(images), targets(captions, mix(self._seed, _TARGET, global_indices)), faults, replaced
        except UserError as exc:
            raise UserError(f"{exc}; in {self._source.description}, one of {', '.join(keys)}") from exc

    def _in_order(self, position: int, rows: range) -> I64:
        """The global indices in some rows of the batch at a position; the rows are sorted by canonical node."""
        return rows_by_node(self._order, range(position, position + self._batch_size), rows)

    def _load(self, sample: int, global_index: int, faults: list[Fault]) -> tuple[RawSample, Image.Image]:
        """The sample, or its first good replacement."""
        source = self._source
        for candidate in chain([sample], self._replacements(global_index)):
            if candidate in self._decoded:
                return self._decoded[candidate]
            try:
                raw = source[candidate]
                image = decode_image(raw.image, source.name(candidate), self._decoding)
            except BadSample as exc:
                faults.append(exc.fault)
                continue
            # Kept for later epochs if all images of the data set would fit into memory.
            if (len(raw.image) + image.width * image.height * 4) * len(source) <= _KEPT_BYTES:
                self._decoded[candidate] = raw, image
            return raw, image
        raise UserError(
            f"{source.description}: {_ATTEMPTS} samples in a row cannot be used, the last: {faults[-1]};"
            " `evaclip data check` lists the faults"
        )

    def _replacements(self, global_index: int) -> Iterator[int]:
        for attempt in range(1, _ATTEMPTS):
            draw = int(mix(self._seed, _REPLACEMENT, global_index, attempt)[0])
            # First from the same window: its shards are read anyway.
            yield self._order.nearby(global_index, draw) if attempt < _NEARBY else draw % len(self._source)


def _join(images: list[Any]) -> Any:
    """One batch of images of one size, or of packed images."""
    # In a worker, tensors that default_collate stacks are in shared memory at once.
    return PackedImages.concatenate(images) if isinstance(images[0], PackedImages) else default_collate(images)


def _units(batch_size: int) -> list[slice]:
    """The rows of a rank's batch in equal units, each the work of one worker at a time."""
    bounds = np.linspace(0, batch_size, -(-batch_size // UNIT) + 1).astype(int).tolist()
    return list(map(slice, bounds, bounds[1:]))


def rank_rows(batch_size: int, rank: int, processes: int, together: int = 1) -> range:
    """The rows of a global batch that belong to one process; some have one row more than others if they must.

    Rows stay `together` so many at a time, where the batch is a multiple of that: then it is one such group more.
    """
    groups = batch_size // together
    return range(rank * groups // processes * together, (rank + 1) * groups // processes * together)


def tokenized(tokenizer: Callable[[list[str]], Tensor]) -> Targets:
    """The targets that are the captions' tokens, int64 [n, context_length]."""
    return partial(_tokens, tokenizer)


def _tokens(tokenizer: Callable[[list[str]], Tensor], captions: list[str], seeds: U64) -> Tensor:
    return tokenizer(captions)


class EvalBatch(NamedTuple):
    """Samples in the order of the source.

    Attributes:
        images: float32 [n, 3, H, W], or packed.
        captions: the n main captions.
        keys: the n sample keys.
    """

    images: Any
    captions: list[str]
    keys: list[str]


def iterate(source: Source, transform: EvalTransform, batch_size: int, workers: int = 0) -> Iterator[EvalBatch]:
    """Yields every usable sample once, in order.

    Bad samples are logged and left out, so a batch can be smaller than `batch_size`; an empty one is not
    yielded. Raises UserError for a batch size below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be 1 or more, got {batch_size}")
    faults = FaultLog()
    faults.add(source.faults)
    read = partial(_read_samples, source, transform, batch_size)
    for images, captions, keys, bad in WorkerLoader(read, range(0, len(source), batch_size), WorkerOptions(workers)):
        faults.add(bad)
        if keys:
            yield EvalBatch(images, captions, keys)


def _read_samples(
    source: Source, transform: EvalTransform, batch_size: int, first: int
) -> tuple[Any, list[str], list[str], list[Fault]]:
    images, captions, keys, faults = list[Any](), list[str](), list[str](), list[Fault]()
    for index in range(first, min(first + batch_size, len(source))):
        try:
            raw = source[index]
            image = decode_image(raw.image, source.name(index), source.decoding)
        except BadSample as exc:
            faults.append(exc.fault)
            continue
        images.append(transform(image))
        captions.append(raw.caption)
        keys.append(raw.key)
    return _join(images) if images else None, captions, keys, faults
