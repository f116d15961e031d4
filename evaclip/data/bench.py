"""How fast a source can be read: the stages one by one, then whole batches from worker processes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evaclip.data.loader import TrainLoader, TrainTransform
from evaclip.data.order import sample_order
from evaclip.data.samples import BadSample, decode_image
from evaclip.data.source import Source

_STAGE_SAMPLES = 256
_SEED = 0


@dataclass(frozen=True)
class StageTimes:
    """Mean cost of one sample in one process: milliseconds per stage, and the bytes of its image file."""

    read_ms: float
    decode_ms: float
    transform_ms: float
    image_bytes: float


@dataclass(frozen=True)
class Throughput:
    """What a loader delivers.

    Attributes:
        first_batch_seconds: from the start of the workers to the first batch.
        samples_per_second: after the first batch.
    """

    first_batch_seconds: float
    samples_per_second: float


def time_stages(source: Source, transform: TrainTransform, seconds: float = 5.0) -> StageTimes:
    """Times the stages on up to 256 samples in training order; bad samples do not count.

    torch uses one thread meanwhile, as it does in a worker. Takes little more than `seconds`.
    """
    order = sample_order(len(source), _SEED, shard_sizes=source.shard_sizes)
    totals = [0.0, 0.0, 0.0]
    samples = image_bytes = 0
    deadline = time.perf_counter() + seconds
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for position in range(min(_STAGE_SAMPLES, len(source))):
        index = order.index(position)[1]
        marks = [time.perf_counter()]
        try:
            raw = source[index]
            marks.append(time.perf_counter())
            picture = decode_image(raw.image, source.name(index), source.decoding)
        except BadSample:
            continue
        marks.append(time.perf_counter())
        transform(picture, position)
        marks.append(time.perf_counter())
        totals = [total + end - start for total, start, end in zip(totals, marks, marks[1:], strict=False)]
        samples += 1
        image_bytes += len(raw.image)
        if marks[-1] > deadline:
            break
    torch.set_num_threads(threads)
    read, decode, change = (1e3 * total / max(samples, 1) for total in totals)
    return StageTimes(read, decode, change, image_bytes / max(samples, 1))


def time_loader(
    source: Source, transform: TrainTransform, batch_size: int, workers: int, seconds: float = 10.0
) -> Throughput:
    """Takes batches as fast as they come, for `seconds` and at least one batch after the first."""
    loader = TrainLoader(
        source, batch_size=batch_size, transform=transform, tokenizer=_no_tokens, seed=_SEED, workers=workers
    )
    began = time.perf_counter()
    batches = loader.batches()
    next(batches)
    first = time.perf_counter()
    samples = 0
    for batch in batches:
        samples += len(batch.images)
        now = time.perf_counter()
        if now - first >= seconds:
            break
    batches.close()
    return Throughput(first - began, samples / (now - first))


def _no_tokens(captions: Sequence[str]) -> Tensor:
    return torch.zeros(len(captions), 1, dtype=torch.int64)
