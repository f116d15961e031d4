"""Batches for training, an endless stream with one integer as its position, and batches for evaluation."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from evaclip.data.config import DEFAULT_WINDOW
from evaclip.data.mixture import MixedOrder, MixtureSource
from evaclip.data.order import I64, U64, SampleOrder, mix, rows_by_node, sample_order
from evaclip.data.remote import Prefetcher, RemoteShard
from evaclip.data.samples import BadSample, Decoding, Fault, FaultLog, decode_image
from evaclip.data.source import Source
from evaclip.data.workers import WorkerLoader
from evaclip.errors import UserError
from evaclip.packing import PackedImages

TrainTransform = Callable[[Image.Image, int], Tensor | PackedImages]
"""(image, seed) -> float32 or uint8 [3, H, W], or one packed image; a pure function of both."""
Targets = Callable[[list[str], U64], Tensor]
"""(n captions, n seeds) -> [n, ...]: tokens, labels or masks to be learnt; a pure function of
each sample's caption and seed."""

EvalTransform = Callable[[Image.Image], Tensor | PackedImages]
"""image -> float32 or uint8 [3, H, W], or one packed image."""

UNIT = 64
"""Most samples that a worker reads at a time."""
_ATTEMPTS = 100
_KEPT_BYTES = 2**26
_NEARBY = 50
_REPLACEMENT, _CAPTION, _AUGMENTATION, _TARGET = 1, 2, 3, 4


@dataclass(frozen=True)
class Batch:
    """One rank's rows of a global batch; `len()` is their number.

    Attributes:
        pieces: images of consecutive rows, [n, 3, H, W] or packed, one or more pieces. They are joined on the device,
            which saves a copy in host memory.
        targets: [rows, ...], see Targets.
        position: samples that all ranks have consumed after this batch; `batches(position)` continues there.
        skipped: rows of this batch whose sample was bad and was replaced, once each.
    """

    pieces: Sequence[Any]
    targets: Tensor
    position: int = 0
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, rows: slice) -> "Batch":
        """Consecutive rows, as views."""
        start, stop, _ = rows.indices(len(self))
        pieces = []
        for piece in self.pieces:
            if start < len(piece) and stop > 0:
                pieces.append(piece[max(start, 0) : stop])
            start, stop = start - len(piece), stop - len(piece)
        return replace(self, pieces=pieces, targets=self.targets[rows])

    @property
    def lengths(self) -> Tensor | None:
        """Patches of each image, int64 [rows]; None if the images aren't packed."""
        is_packed = isinstance(self.pieces[0], PackedImages)
        return torch.cat([piece.lengths for piece in self.pieces]) if is_packed else None

    @property
    def images(self) -> Any:
        """The images, [rows, 3, H, W] or packed, in host memory."""
        return self.images_on("cpu")

    def images_on(self, device: torch.device | str, non_blocking: bool = False) -> Any:
        """The images, [rows, 3, H, W] or packed, on a device."""
        pieces = [piece.to(device, non_blocking=non_blocking) for piece in self.pieces]
        if len(pieces) == 1:
            return pieces[0]
        return PackedImages.concatenate(pieces) if isinstance(pieces[0], PackedImages) else torch.cat(pieces)


@dataclass(frozen=True, eq=False)
class TrainSamples(Dataset[Any]):
    """Training samples by their global indices: read, decoded and augmented, bad ones replaced.

    Attributes:
        order: global indices to indices of `source`.
        decoding: of the image files.
    """

    source: Source
    order: SampleOrder | MixedOrder
    seed: int
    decoding: Decoding
    transform: TrainTransform
    targets: Targets
    _decoded: dict[int, tuple[Sequence[str], Image.Image]] = field(default_factory=dict, init=False)
    _prefetcher: Prefetcher = field(default_factory=Prefetcher, init=False)

    def __getitem__(self, global_indices: I64) -> Any:
        """Images [n, 3, H, W] or packed, targets [n, ...], faults of all attempts, number of replaced rows.

        Returns a UserError instead of raising it, see `WorkerLoader`.
        """
        source, seed = self.source, self.seed
        now, after = self.order.shards(global_indices)
        self._prefetcher.want(source.tar_shards([*now, *after]))
        indices = self.order.indices(global_indices).tolist()
        caption_draws = mix(seed, _CAPTION, global_indices).tolist()
        image_seeds = (mix(seed, _AUGMENTATION, global_indices) >> np.uint64(1)).tolist()
        images, captions, faults, replaced = list[Any](), list[str](), list[Fault](), 0
        try:
            for row, global_index in enumerate(global_indices.tolist()):
                earlier = len(faults)
                indices[row], texts, image = self._load(indices[row], global_index, faults)
                replaced += len(faults) > earlier
                captions.append(texts[caption_draws[row] % len(texts)] if texts else "")
                try:
                    images.append(self.transform(image, image_seeds[row]))
                except Exception as exc:
                    exc.add_note(f"while transforming {source.name(indices[row])}")
                    raise
            try:
                targets = self.targets(captions, mix(seed, _TARGET, global_indices))
            except UserError as exc:
                keys = ", ".join(source.place(index)[1] for index in indices)
                raise UserError(f"{exc}; in {source.description}, one of {keys}") from exc
        except UserError as exc:
            return exc
        return _join(images), targets, faults, replaced

    def _load(self, index: int, global_index: int, faults: list[Fault]) -> tuple[int, Sequence[str], Image.Image]:
        """Index, captions and image of a sample, or of its first good replacement."""
        for attempt in range(1, _ATTEMPTS + 1):
            if index in self._decoded:
                return index, *self._decoded[index]
            try:
                raw = self.source[index]
                image = decode_image(raw.image, self.source.name(index), self.decoding)
            except BadSample as exc:
                faults.append(exc.fault)
                draw = int(mix(self.seed, _REPLACEMENT, global_index, attempt)[0])
                # The shards of the same window are read anyway. Those of others may be used if they are local files.
                is_nearby = attempt < _NEARBY or self.source.remote
                index = self.order.nearby(global_index, draw) if is_nearby else draw % len(self.source)
                continue
            # Kept for later epochs if all images of the data set would fit into memory.
            if (len(raw.image) + image.width * image.height * 4) * len(self.source) <= _KEPT_BYTES:
                self._decoded[index] = raw.captions, image
            return index, raw.captions, image
        raise UserError(
            f"{self.source.description}: {_ATTEMPTS} samples in a row cannot be used, the last: {faults[-1]};"
            " `evaclip data check` lists the faults"
        )


class TrainLoader:
    """Endless shuffled batches of a source, decoded and augmented by worker processes.

    The global batch at position p holds the samples with the global indices [p, p + batch_size), sorted by canonical
    node; rank r gets the rows of `rank_rows`. Samples, order, captions and augmentation of a batch depend on
    seed and position only. Epochs have no gap between them, so a batch can hold the end of one and the start of the
    next. A bad sample is logged and replaced by one that its global index determines. Shards of the next window are
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
        together: int = 1,
    ) -> None:
        if batch_size < world_size:
            raise UserError(f"batch_size must be {world_size} or more, a sample for each rank, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size), got rank {rank} of {world_size}")
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
        self._batch_size = batch_size
        self._rows = rank_rows(batch_size, rank, world_size, together)
        self._units = -(-len(self._rows) // UNIT)
        self._workers, self._pin = workers, pin
        self._prefetch = max(prefetch, -(-prefetch * self._units // max(workers, 1)))
        order: SampleOrder | MixedOrder
        if isinstance(source, MixtureSource):
            order = source.order(seed, window, nodes)
        else:
            order = sample_order(len(source), seed, window, source.shard_sizes, nodes)
        decoding = replace(source.decoding, at_least=decode_size)
        self._samples = TrainSamples(source, order, seed, decoding, transform, targets)
        if source.remote:
            ranks = [rank_rows(batch_size, each, world_size, together) for each in machine or [rank]]
            self._require_room(range(ranks[0].start, ranks[-1].stop), window, len(ranks))

    @property
    def remote(self) -> bool:
        """Whether shards are fetched, and waited for."""
        return self._samples.source.remote

    def set_transform(self, transform: TrainTransform, targets: Targets) -> None:
        """Sets the transform and targets of later calls of `batches`. Order and random draws stay the same."""
        self._samples = replace(self._samples, transform=transform, targets=targets)

    def batches(self, position: int = 0) -> Generator[Batch, None, None]:
        """The batches from a position on, endlessly; any position that a batch reported, at any world size,
        will do.

        Closing the iterator ends the workers. Raises UserError if a whole row of replacements is bad too,
        RuntimeError if a worker process dies.
        """
        if position < 0:
            raise ValueError(f"position must be 0 or more, got {position}")
        starts = count(position, self._batch_size)
        units = (unit for start in starts for unit in np.array_split(self._in_order(start, self._rows), self._units))
        results = iter(WorkerLoader(self._samples, units, self._workers, self._prefetch, self._pin))
        for end in count(position + self._batch_size, self._batch_size):
            pieces, targets, faults, replaced = zip(*islice(results, self._units), strict=True)
            self.faults.add(chain.from_iterable(faults))
            yield Batch(pieces, torch.cat(targets), end, sum(replaced))

    def _require_room(self, rows: range, window: int, ranks: int) -> None:
        """Raises UserError if the cache is too small for the remote shards that a machine reads at the same time."""
        wanted = self._samples.source.tar_shards(self._samples.order.shards(self._in_order(0, rows))[0])
        shards = [shard for shard in wanted if isinstance(shard, RemoteShard)]
        size = sum(shard.size for shard in shards)
        if shards and size > (capacity := shards[0].cache.capacity):
            readers = f", which {ranks} processes of this machine read," if ranks > 1 else ""
            raise UserError(
                f"a shuffle window of {window} samples (0: all){readers} takes {len(shards)} remote shards,"
                f" {size / 1e9:.3g} GB, but local copies may take {capacity / 1e9:.3g} GB: raise data.remote.cache_gb,"
                " to twice as much for the next window to be fetched meanwhile, or lower data.shuffle_window"
            )

    def _in_order(self, position: int, rows: range) -> I64:
        """The global indices in some rows of the batch at a position; the rows are sorted by canonical node."""
        return rows_by_node(self._samples.order, range(position, position + self._batch_size), rows)


def _join(images: list[Any]) -> Any:
    """One batch of images of one size, or of packed images."""
    # In a worker, tensors that default_collate stacks are in shared memory at once.
    return PackedImages.concatenate(images) if isinstance(images[0], PackedImages) else default_collate(images)


def rank_rows(batch_size: int, rank: int, processes: int, together: int = 1) -> range:
    """The rows of a global batch that belong to one rank. Ranks have equal numbers of rows, or differ by one group.

    A group is `together` consecutive rows; the batch must be a multiple of that.
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
    indices = range(len(source))
    rows = (indices[start : start + batch_size] for start in indices[::batch_size])
    for batch, bad in WorkerLoader(EvalSamples(source, transform), rows, workers):
        faults.add(bad)
        if batch.keys:
            yield batch


@dataclass(frozen=True, eq=False)
class EvalSamples(Dataset[Any]):
    """Samples of a source by their indices: read, decoded and transformed, without bad ones."""

    source: Source
    transform: EvalTransform

    def __getitem__(self, indices: range) -> tuple[EvalBatch, list[Fault]] | UserError:
        """The batch, without images if all samples are bad, and the faults; a UserError instead of raising it."""
        source, images, captions, keys, faults = self.source, list[Any](), list[str](), list[str](), list[Fault]()
        try:
            for index in indices:
                try:
                    raw = source[index]
                    image = decode_image(raw.image, source.name(index), source.decoding)
                except BadSample as exc:
                    faults.append(exc.fault)
                    continue
                images.append(self.transform(image))
                captions.append(raw.caption)
                keys.append(raw.key)
        except UserError as exc:
            return exc
        return EvalBatch(_join(images) if images else None, captions, keys), faults
