"""The smallest task whose loss is a mean over samples: labels of images, by a tower with a classifier."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip.data.loader import Targets
from evaclip.model.config import VisionConfig
from evaclip.model.vision_model import VisionModel
from evaclip.train.config import TrainConfig
from evaclip.train.distributed import World
from evaclip.train.micro_batch import MicroBatch
from evaclip.train.tasks.task import MeanOverSamples, Size

CLASSES = 5


class ImageLabels(MeanOverSamples):
    """Labels are the captions' lengths."""

    model: VisionModel

    @classmethod
    def create_model(cls, config: TrainConfig | None = None, **how: Any) -> VisionModel:
        small = VisionConfig(width=16, layers=2, heads=2, image_size=16, patch_size=4)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = VisionModel(small, CLASSES)
            model.reset_parameters()
        return model

    @staticmethod
    def towers_of(model: VisionModel) -> dict[str, nn.Module]:
        return {"visual": model}

    @classmethod
    def build(cls, config: TrainConfig, world: World, model: VisionModel) -> Self:
        return cls(model, cls.towers_of(model), model.preprocess)

    def targets(self, size: Size) -> Targets:
        return lambda captions, seeds: torch.tensor([len(caption) % CLASSES for caption in captions])

    def of_samples(self, images: Tensor, micro_batch: MicroBatch) -> dict[str, Tensor]:
        logits = self.model(images, token_index=micro_batch.token_index)
        hits = logits.argmax(dim=-1) == micro_batch.targets
        return {
            "loss": F.cross_entropy(logits, micro_batch.targets, reduction="none"),
            "accuracy": hits.to(logits.dtype),
        }

    def evaluation(self, config: TrainConfig, world: World, held_out: Any) -> None:
        return None

    def flops_per_sample(self, size: Size) -> float:
        return 1.0

    def tokens_computed(self, targets: Tensor) -> int:
        return len(targets)

    def stand_ins(self, rows: int, sizes: set[int], fake: Any) -> Tensor:
        found: Tensor = fake(torch.zeros(rows, dtype=torch.int64))
        return found

    def descriptions(self, config: TrainConfig) -> dict[str, Any]:
        return {}
