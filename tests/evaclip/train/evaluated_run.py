"""Runs whose evaluation is watched, stopped, and disturbed."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from typing import Any
from unittest.mock import patch

from torch import Tensor

from evaclip.model.clip import CLIP
from evaclip.train.config import TrainConfig
from evaclip.train.distributed_encoder import DistributedEncoder
from evaclip.train.trainer import train


@contextmanager
def counting_batches(act: Callable[[], None], at: int = 1) -> Iterator[list[int]]:
    """Yields the sizes of the pictures' batches of evaluations, and acts in the one of this number."""
    original, sizes = CLIP.encode_image, list[int]()

    def encode_image(self: CLIP, images: Tensor, *args: Any, **options: Any) -> Tensor:
        if not self.training:
            sizes.append(len(images))
            if len(sizes) == at:
                act()
        return original(self, images, *args, **options)

    with patch.object(CLIP, "encode_image", encode_image):
        yield sizes


def train_and_stop(config: TrainConfig) -> None:
    """One of two processes, of which the second is told to stop in its last batch of the first evaluation."""
    is_told = os.environ["RANK"] == "1"
    with counting_batches(lambda: os.kill(os.getpid(), signal.SIGTERM), at=6 if is_told else -1):
        outcome = train(config)
    assert (outcome.stopped_by, outcome.steps) == (143, 3)


def train_with_a_fault(config: TrainConfig, fault: str) -> None:
    """One of two processes, of which the second loses its data worker or disk after the first evaluation's first read.

    Not within the model: where that is cut up, the others would wait there.
    """
    original, calls = DistributedEncoder.encode_image, list[int]()

    def encode_image(self: DistributedEncoder, images: Tensor, normalize: bool = False) -> Tensor:
        calls.append(len(images))
        if len(calls) == 1 and os.environ["RANK"] == "1":
            if fault == "disk":
                raise OSError("no such disk")
            for worker in active_children():
                worker.kill()
        return original(self, images, normalize)

    with patch.object(DistributedEncoder, "encode_image", encode_image):
        assert train(config).steps == 6
