"""Batches for evaluation: a source once, in order, as it is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from evaclip.data.faults import FaultLog
from evaclip.data.samples import BadSample, Fault, decode_image
from evaclip.data.source import Source
from evaclip.data.workers import WorkerOptions, run_batches
from evaclip.errors import UserError

EvalTransform = Callable[[Image.Image], Tensor]
"""picture -> float32 [3, H, W]."""


class EvalBatch(NamedTuple):
    """Samples in the order of the source.

    Attributes:
        images: float32 [n, 3, H, W].
        captions: the n main captions.
        keys: the n sample keys.
    """

    images: Tensor
    captions: list[str]
    keys: list[str]


def iterate(source: Source, transform: EvalTransform, batch_size: int, workers: int = 0) -> Iterator[EvalBatch]:
    """Yields every usable sample once, in order.

    Bad samples are logged and left out, so a batch can be smaller than `batch_size`; an empty one is not
    yielded. Raises UserError for a batch size below 1.
    """
    if batch_size < 1:
        raise UserError(f"the batch size must be 1 or more, got {batch_size}")
    faults = FaultLog()
    faults.add(source.faults)
    reader = _BatchReader(source, transform, batch_size)
    for images, captions, keys, bad in run_batches(reader, range(0, len(source), batch_size), WorkerOptions(workers)):
        faults.add(bad)
        if keys:
            yield EvalBatch(torch.stack(images), captions, keys)


@dataclass(frozen=True)
class _BatchReader:
    source: Source
    transform: EvalTransform
    batch_size: int

    def __call__(self, first: int) -> tuple[list[Tensor], list[str], list[str], list[Fault]]:
        images, captions, keys, faults = list[Tensor](), list[str](), list[str](), list[Fault]()
        for index in range(first, min(first + self.batch_size, len(self.source))):
            try:
                raw = self.source[index]
                picture = decode_image(raw.image, self.source.name(index), self.source.decoding)
            except BadSample as exc:
                faults.append(exc.fault)
                continue
            images.append(self.transform(picture))
            captions.append(raw.caption)
            keys.append(raw.key)
        return images, captions, keys, faults
