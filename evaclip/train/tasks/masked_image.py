"""Masked image modelling: predict a teacher's features of masked patches (EVA, Fang et al. 2022); its evaluation."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from evaclip.data import Source, open_configured
from evaclip.data.loader import Batch, Targets
from evaclip.data.masks import BlockMasks
from evaclip.data.order import U64
from evaclip.errors import UserError
from evaclip.eval.classify import assign_labels
from evaclip.eval.probes import knn, linear_probe
from evaclip.factory import create_masked_image_model
from evaclip.model.flops import masked_image_flops
from evaclip.model.masked_image import MaskedImageModel
from evaclip.train.config import MaskedImageTask, Metric, TrainConfig
from evaclip.train.distributed import World
from evaclip.train.evaluation import (
    Attempt,
    DistributedEncoder,
    EvalSet,
    Metrics,
    encode_everywhere,
    measured,
    open_sets,
)
from evaclip.train.micro_batch import MicroBatch
from evaclip.train.tasks.task import Evaluate, ImageModelTask, Size, describe_image_model
from evaclip.train.tasks.teacher import Teacher, features_of, open_teacher, similarity
from evaclip.train.throughput import BACKWARD_FACTOR
from evaclip.transforms import EvalTransform

_PROBES: dict[Metric, Callable[..., Any]] = {"knn": knn, "linear_probe": linear_probe}


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

    def evaluation(self, config: TrainConfig, world: World, validation: Source | None) -> Evaluate | None:
        sets = [_open(each) for each in open_sets(config, validation)]
        transform = EvalTransform(self.model.config.image_size, self.preprocess)

        def measure(model: MaskedImageModel, stop: Callable[[], bool]) -> tuple[Metrics, list[str]]:
            loss = DistributedEncoder(_Loss(model, self.teacher), world, None, stop)
            features = DistributedEncoder(model, world, None, stop)
            return measured(model, {s.tested.name: partial(_evaluate, s, loss, features, transform) for s in sets})

        return measure if sets else None

    def flops_per_sample(self, size: Size) -> float:
        masks, model = self._masks(size), self.model
        sized = replace(model.config, image_size=size)
        student = masked_image_flops(sized, model.lm_head.out_features, masks.count, len(model.decoder_blocks))
        return BACKWARD_FACTOR * student + self.teacher.flops_per_sample(masks.grid)

    def tokens_computed(self, batch: Batch) -> int:
        """The class token and all patches of each image; without masked patches if these are dropped."""
        targets = batch.targets
        seen = self.model.num_patches - (targets.shape[1] if len(self.model.decoder_blocks) else 0)
        return len(targets) * (1 + seen)

    def stand_ins(self, rows: int, sizes: set[int], fake: Callable[[Any], Any]) -> Tensor:
        found: Tensor = fake(torch.arange(self._masks(self.model.config.image_size).count).repeat(rows, 1))
        return found

    def descriptions(self, config: TrainConfig) -> dict[str, Any]:
        """The descriptions of the image model without the layers that predict features."""
        return describe_image_model(self.model, config, 0, pool="mean")

    def _masks(self, size: Size) -> BlockMasks:
        grid = replace(self.model.config, image_size=size).grid
        return BlockMasks(grid, self._config.mask_ratio, self._config.smallest_block)


def _masked(masks: BlockMasks, captions: list[str], seeds: U64) -> Tensor:
    return torch.from_numpy(np.stack([masks(seed) for seed in seeds.tolist()]))


def _task(config: TrainConfig) -> MaskedImageTask:
    assert isinstance(config.task, MaskedImageTask)
    return config.task


@dataclass(frozen=True)
class _ProbedSet:
    """An evaluation set, the labelled images to which probes are fitted, and the metrics."""

    tested: EvalSet
    fit: Source | None
    metrics: tuple[Metric, ...]


def _open(each: EvalSet) -> _ProbedSet:
    fit, key = each.config.fit, f"eval.sets.{each.name}"
    metrics: tuple[Metric, ...] = each.config.metrics or (("loss",) if fit is None else ("knn",))
    if others := [metric for metric in metrics if metric not in ("loss", *_PROBES)]:
        raise UserError(
            f"{key}.metrics must be loss, {', '.join(_PROBES)} with task.name=masked_image, got {', '.join(others)}"
        )
    if fit is None and metrics != ("loss",):
        raise UserError(f"{key}.fit must be labelled images for {', '.join(metrics)}, got None")
    return _ProbedSet(each, None if fit is None else open_configured(replace(fit, caption_template="{}")), metrics)


def _evaluate(
    each: _ProbedSet, loss: DistributedEncoder, encoder: DistributedEncoder, transform: EvalTransform, attempt: Attempt
) -> Metrics:
    metrics: Metrics = {}
    if "loss" in each.metrics:
        metrics |= attempt(["loss"], lambda: _mean_loss(each.tested, loss, transform))
    if probes := [metric for metric in each.metrics if metric in _PROBES]:
        names = [f"{probe}_top1" for probe in probes]
        metrics |= attempt(names, lambda: _probe(each, probes, encoder, transform, attempt))
    return metrics


def _mean_loss(each: EvalSet, loss: DistributedEncoder, transform: EvalTransform) -> Metrics:
    found = encode_everywhere(loss, transform, each.source, each)
    return {"loss": found.features.double().mean().item(), "samples": len(found)}


def _probe(
    probed: _ProbedSet, probes: list[Metric], encoder: DistributedEncoder, transform: EvalTransform, attempt: Attempt
) -> Metrics:
    each, fit = probed.tested, probed.fit
    assert fit is not None
    assert each.config.fit is not None
    fitted_set = replace(each, options=replace(each.options, workers=each.config.fit.workers))
    fitted = encode_everywhere(encoder, transform, fit, fitted_set)
    tested = encode_everywhere(encoder, transform, each.source, each)
    names = [each.source.name(int(key)) for key in tested.keys]
    known = assign_labels(fitted.captions, fitted.keys, each.classnames, fit.classes)
    labels = assign_labels(tested.captions, names, known.classnames, each.source.classes)
    classes = len(known.classnames)
    metrics: Metrics = {"samples": len(tested), "fit_samples": len(fitted), "classes": classes}
    for name in probes:

        def accuracy(name: Metric = name) -> Metrics:
            data = (fitted.features, known.indices), (tested.features, labels.indices)
            result = _PROBES[name](*data, classes=classes, over=encoder.over)
            return {f"{name}_top1": result.top1, f"{name}_top5": result.top5}

        metrics |= attempt([f"{name}_top1"], accuracy)
    return metrics


class _Loss(nn.Module):
    """A student that encodes an image as its loss with every second patch masked, the authors' measure."""

    def __init__(self, model: MaskedImageModel, teacher: Teacher) -> None:
        super().__init__()
        self.student = model
        self.config = model.config
        self._teacher = teacher

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        images = images.to(self._teacher.tower.pos_embed.device)  # an offloaded student is in host memory
        grid = self.student.present.grid
        masked = torch.arange(0, self.student.num_patches, 2, device=images.device).expand(len(images), -1)
        wanted = self._teacher(images, grid)[:, ::2].flatten(0, 1)
        cosines: Tensor = similarity(self.student(images, masked), wanted).unflatten(0, masked.shape)
        return -cosines.mean(1, keepdim=True)
