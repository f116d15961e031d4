"""Runs whose evaluation is watched, stopped, and disturbed."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evaclip.model.clip import CLIP
from evaclip.train import evaluation
from evaclip.train.config import TrainConfig
from evaclip.train.distributed_encoder import DistributedEncoder
from evaclip.train.evaluation import Evaluation
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


class _Scores(TorchDispatchMode):
    """Counts the scores in float64, in which evaluations rank."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and args[0].dtype == torch.float64:
            self.count += len(args[0]) * args[1].shape[1]
        return func(*args, **(kwargs or {}))


def write_scores(config: TrainConfig, folder: Path) -> None:
    """The number of scores that this rank computes in one evaluation, and the metrics."""
    scores, original = _Scores(), Evaluation.__call__

    def call(*args: Any) -> Any:
        with scores:
            return original(*args)

    with patch.object(Evaluation, "__call__", call), patch.object(evaluation, "_BLOCK", 8, create=True):
        metrics = train(config).metrics
    (folder / f"{config.name}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps([scores.count, metrics]))


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
