"""How fast a source can be read: the stages one by one, then whole batches from worker processes."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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


class StageTimes(NamedTuple):
    """Mean cost of one sample: milliseconds of a core per stage, and the bytes of its image file."""

    read_ms: float
    decode_ms: float
    transform_ms: float
    image_bytes: float

    @property
    def per_second(self) -> float:
        """Samples a second that one core makes ready."""
        return 1e3 / sum(self[:3])


class Throughput(NamedTuple):
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


def time_stages(source: Source, transform: TrainTransform, decoding: Decoding, seconds: float = 5.0) -> StageTimes:
    """Times the stages on up to 256 samples in training order; bad samples do not count.

    torch uses one thread meanwhile, as it does in a worker. Takes little more than `seconds`. Times are CPU times,
    without waits for the disk.
    """
    order = sample_order(len(source), _SEED, shard_sizes=source.shard_sizes)
    costs = list[list[float]]()
    deadline = time.perf_counter() + seconds
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for position, index in enumerate(order.indices(np.arange(min(_STAGE_SAMPLES, len(source)))).tolist()):
        start = time.thread_time()
        try:
            raw = source[index]
            read = time.thread_time()
            image = decode_image(raw.image, source.name(index), decoding)
        except BadSample:
            continue
        decoded = time.thread_time()
        transform(image, position)
        costs.append([read - start, decoded - read, time.thread_time() - decoded, len(raw.image)])
        if time.perf_counter() > deadline:
            break
    torch.set_num_threads(threads)
    return StageTimes(*np.mean(costs or [[0.0] * 4], axis=0) * [1e3, 1e3, 1e3, 1])


def time_loader(
    source: Source,
    transform: TrainTransform,
    batch_size: int,
    workers: int,
    step_seconds: float = 0.0,
    seconds: float = 10.0,
) -> Throughput:
    """Takes batches for `seconds` and at least one after the first, each followed by a pause of a step's length."""
    loader = TrainLoader(
        source, batch_size=batch_size, transform=transform, targets=_no_targets, seed=_SEED, workers=workers
    )
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


def _shared_bytes() -> int:
    return shutil.disk_usage(_SHARED_MEMORY).used if _SHARED_MEMORY.exists() else 0


def _no_targets(captions: Sequence[str], seeds: U64) -> Tensor:
    return torch.zeros(len(captions), 1, dtype=torch.int64)
