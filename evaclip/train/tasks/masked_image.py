"""Masked image modelling: features of a teacher, predicted for the patches that are masked (EVA, Fang et al. 2022)."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from evaclip.data import Source
from evaclip.data.loader import Targets
from evaclip.data.masks import BlockMasks
from evaclip.data.order import U64
from evaclip.factory import create_masked_image_model
from evaclip.model.flops import masked_image_flops
from evaclip.model.masked_image import MaskedImageModel
from evaclip.train.config import MaskedImageTask, TrainConfig
from evaclip.train.distributed import World
from evaclip.train.micro_batch import MicroBatch
from evaclip.train.tasks.image_model import ImageModelTask, described
from evaclip.train.tasks.probing import open_probing
from evaclip.train.tasks.task import Evaluate, Size
from evaclip.train.tasks.teacher import Teacher, features_of, open_teacher, similarity
from evaclip.train.throughput import BACKWARD_FACTOR
from evaclip.transforms import EvalTransform


class MaskedImage(ImageModelTask):
    """The loss is the negative cosine of prediction and feature, the mean over all masked patches of the batch.

    Targets are the masked patches of each sample, int64 `[rows, masked]`, the same number in all: so the mean over
    samples of their means is that over all patches.
    """

    captions: ClassVar[bool] = False
    unused: ClassVar[tuple[str, ...]] = (
        *ImageModelTask.unused, "patch_dropout", "lock_image", "lock_image_unlocked_groups",
    )  # fmt: skip
    model: MaskedImageModel

    def __init__(self, model: MaskedImageModel, teacher: Teacher, config: MaskedImageTask) -> None:
        super().__init__(model, self.towers_of(model), model.preprocess)
        self.teacher = teacher
        self._config = config

    @classmethod
    def create_model(cls, config: TrainConfig, **how: Any) -> MaskedImageModel:
        task, given = _task(config), config.model
        cls.refuse_unused(config)
        return create_masked_image_model(
            given.name,
            features_of(task.teacher),
            given.pretrained,
            pretrained_image=given.pretrained_image,
            decoder_layers=task.decoder_layers if task.masked == "drop" else 0,
            patch_gradient=task.patch_gradient,
            savings=given.savings,
            **how,
            **given.options,
        )

    @classmethod
    def build(cls, config: TrainConfig, world: World, model: MaskedImageModel) -> Self:
        task = _task(config)
        return cls(model, open_teacher(task.teacher, config, world, model), task)

    def extra_tensors(self) -> Iterator[Tensor]:
        return self.teacher.tensors()

    def teacher_identity(self) -> dict[str, Any]:
        return self.teacher.facts

    def remarks(self) -> list[str]:
        has_weights = self._config.teacher.pretrained is not None
        return [] if has_weights else ["the teacher has random weights: set task.teacher.pretrained"]

    def targets(self, size: Size) -> Targets:
        return partial(_masked, self._masks(size))

    def of_samples(self, images: Tensor, micro_batch: MicroBatch) -> dict[str, Tensor]:
        masked = micro_batch.targets
        features = self.teacher(images, self.model.present.grid)
        wanted = features.gather(1, masked.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
        cosines = similarity(self.model(images, masked), wanted.flatten(0, 1))
        return {"loss": -cosines.unflatten(0, masked.shape).mean(1)}

    def evaluation(self, config: TrainConfig, world: World, held_out: Source | None) -> Evaluate | None:
        transform = EvalTransform(self.model.config.image_size, self.preprocess)
        return open_probing(config, world, self.teacher, transform, held_out)

    def flops_per_sample(self, size: Size) -> float:
        masks, model = self._masks(size), self.model
        sized = replace(model.config, image_size=size)
        student = masked_image_flops(sized, model.lm_head.out_features, masks.count, len(model.decoder_blocks))
        return BACKWARD_FACTOR * student + self.teacher.flops_per_sample(masks.grid)

    def tokens_computed(self, targets: Tensor) -> int:
        """The class token and all patches of each image, or only the unmasked ones if masked patches are dropped."""
        seen = self.model.num_patches - (targets.shape[1] if len(self.model.decoder_blocks) else 0)
        return len(targets) * (1 + seen)

    def stand_ins(self, rows: int, sizes: set[int], fake: Callable[[Any], Any]) -> Tensor:
        found: Tensor = fake(torch.arange(self._masks(self.model.config.image_size).count).repeat(rows, 1))
        return found

    def descriptions(self, config: TrainConfig) -> dict[str, Any]:
        """Those of the image model that the weights give once what predicts is left out."""
        return described(self.model, config, 0, pool="mean")

    def _masks(self, size: Size) -> BlockMasks:
        grid = replace(self.model.config, image_size=size).grid
        return BlockMasks(grid, self._config.mask_ratio, self._config.smallest_block)


def _masked(masks: BlockMasks, captions: list[str], seeds: U64) -> Tensor:
    return torch.from_numpy(np.stack([masks(seed) for seed in seeds.tolist()]))


def _task(config: TrainConfig) -> MaskedImageTask:
    assert isinstance(config.task, MaskedImageTask)
    return config.task
