"""How fast a source can be read: the stages one by one, then whole batches from worker processes."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaclip.data.loader import TrainLoader, TrainTransform
from evaclip.data.order import U64, sample_order
from evaclip.data.samples import BadSample, Decoding, decode_image
from evaclip.data.source import Source

_STAGE_SAMPLES = 256
_SEED = 0
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class StageTimes:
    """Mean cost of one sample: milliseconds of a core per stage, and the bytes of its image file."""

    read_ms: float
    decode_ms: float
    transform_ms: float
    image_bytes: float

    @property
    def per_second(self) -> float:
        """Samples a second that one core makes ready."""
        return 1e3 / (self.read_ms + self.decode_ms + self.transform_ms)


@dataclass(frozen=True)
class Throughput:
    """Rates and waits of a loader.

    Attributes:
        first_batch_seconds: from the start of the workers to the first batch.
        samples_per_second: after the first batch.
        waited: share of the time in which the consumer waited for a batch.
        shared_bytes: most shared memory that the machine held more than before; None where there is none to look at.
    """

    first_batch_seconds: float
    samples_per_second: float
    waited: float
    shared_bytes: int | None


def time_stages(
    source: Source, transform: TrainTransform, decoding: Decoding | None = None, seconds: float = 5.0
) -> StageTimes:
    """Times the stages on up to 256 samples in training order; bad samples do not count.

    torch uses one thread meanwhile, as it does in a worker. Takes little more than `seconds`. `decoding`
    defaults to the source's options. Times are CPU times, without waits for the disk.
    """
    order = sample_order(len(source), _SEED, shard_sizes=source.shard_sizes)
    totals = [0.0, 0.0, 0.0]
    samples = image_bytes = 0
    deadline = time.perf_counter() + seconds
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for position, index in enumerate(order.indices(np.arange(min(_STAGE_SAMPLES, len(source)))).tolist()):
        marks = [time.thread_time()]
        try:
            raw = source[index]
            marks.append(time.thread_time())
            picture = decode_image(raw.image, source.name(index), decoding or source.decoding)
        except BadSample:
            continue
        marks.append(time.thread_time())
        transform(picture, position)
        marks.append(time.thread_time())
        totals = [total + end - start for total, start, end in zip(totals, marks, marks[1:], strict=False)]
        samples += 1
        image_bytes += len(raw.image)
        if time.perf_counter() > deadline:
            break
    torch.set_num_threads(threads)
    read, decode, change = (1e3 * total / max(samples, 1) for total in totals)
    return StageTimes(read, decode, change, image_bytes / max(samples, 1))


def time_loader(loader: TrainLoader, step_seconds: float = 0.0, seconds: float = 10.0) -> Throughput:
    """Takes batches for `seconds` and at least one after the first, each followed by a pause of a step's length."""
    held = _shared_bytes()
    began = time.perf_counter()
    batches = loader.batches()
    next(batches)
    first = time.perf_counter()
    samples, waited, shared = 0, 0.0, 0
    while (start := time.perf_counter()) - first < seconds or not samples:
        time.sleep(step_seconds)
        waited -= time.perf_counter()
        samples += len(next(batches).images)
        waited += time.perf_counter()
        shared = max(shared, _shared_bytes() - held)
    batches.close()
    return Throughput(first - began, samples / (start - first), waited / (start - first), shared or None)


def make_loader(source: Source, transform: TrainTransform, batch_size: int, workers: int) -> TrainLoader:
    """A loader as training has it, but that captions come to nothing."""
    return TrainLoader(
        source, batch_size=batch_size, transform=transform, targets=_no_targets, seed=_SEED, workers=workers
    )


def _shared_bytes() -> int:
    return shutil.disk_usage(_SHARED_MEMORY).used if _SHARED_MEMORY.exists() else 0


def _no_targets(captions: Sequence[str], seeds: U64) -> Tensor:
    return torch.zeros(len(captions), 1, dtype=torch.int64)
