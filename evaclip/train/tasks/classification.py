"""Fine-tuning of classifiers (EVA, Fang et al. 2022; EVA-02, Fang et al. 2023), and their evaluation."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip.data import Source
from evaclip.data.config import DataConfig
from evaclip.data.loader import Batch, Targets, TrainTransform
from evaclip.data.opening import classes_of
from evaclip.data.order import U64
from evaclip.errors import UserError
from evaclip.eval.classify import TOP, ClassSpace, Predictions, evaluate
from evaclip.eval.zero_shot import PLACEHOLDER, load_classnames
from evaclip.factory import create_vision_model
from evaclip.model.flops import vision_flops
from evaclip.model.vision_model import VisionModel
from evaclip.runs.files import CLASSES_FILE
from evaclip.train.config import ClassificationTask, TrainConfig
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
from evaclip.train.throughput import BACKWARD_FACTOR
from evaclip.train.timm_data import Mixing, TimmTransform, partners
from evaclip.transforms import EvalTransform, OpaqueTransform

_TRANSFORM = DataConfig(train="").transform


class Classification(ImageModelTask):
    """Cross-entropy with smoothed labels, of images that may be mixed with their neighbours in the batch.

    Args:
        model: its targets are int64 labels [b].
        config: options of labels and mixing.
        classes: of the labels.
        seed: of the mixing.
    """

    model: VisionModel

    def __init__(self, model: VisionModel, config: ClassificationTask, classes: ClassSpace, seed: int = 0) -> None:
        super().__init__(model, self.towers_of(model), model.preprocess)
        self._config = config
        self._classes = classes
        self._mixing = Mixing(config, seed) if _mixes(config) else None

    @classmethod
    def create_model(cls, config: TrainConfig, **how: Any) -> VisionModel:
        model, options = config.model, dict(config.model.options)
        cls.refuse_unused(config)
        if model.patch_dropout is not None:
            options["patch_dropout"] = model.patch_dropout
        return create_vision_model(
            model.name,
            model.pretrained or False,
            pretrained_image=model.pretrained_image,
            num_classes=len(classes_for(config).names),
            savings=model.savings,
            as_trained=False,
            **how,
            **options,
        )

    @classmethod
    def build(cls, config: TrainConfig, world: World, model: VisionModel) -> Self:
        if config.model.lock_image:
            model.lock(max(1, config.model.lock_image_unlocked_groups))  # the classifier has start values
        return cls(model, _task(config), classes_for(config), config.seed)

    @classmethod
    def data(cls, config: TrainConfig) -> DataConfig:
        """Captions of class folders are the names alone."""
        return replace(config.data, caption_template=PLACEHOLDER)

    @classmethod
    def rows_per_group(cls, config: TrainConfig) -> int:
        """Pairs that are mixed."""
        return 2 if _mixes(_task(config)) else 1

    def transform(self, data: DataConfig, size: Size) -> TrainTransform:
        """timm's transform, unless the configuration names another."""
        if data.transform != _TRANSFORM:
            return super().transform(data, size)
        return TimmTransform(size, self.preprocess, data.augmentation, self._config)

    def targets(self, size: Size) -> Targets:
        return partial(_labels, self._classes)

    def of_samples(self, images: Tensor, micro_batch: MicroBatch) -> dict[str, Tensor]:
        labels, others, shares = micro_batch.targets, None, None
        if self._mixing is not None:
            images, shares = self._mixing(images, micro_batch.step, micro_batch.first_row)
            others = partners(labels)
        logits = self.model(images, micro_batch.token_index)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cross_entropy = partial(F.cross_entropy, logits, reduction="none", label_smoothing=self._config.label_smoothing)
        loss = cross_entropy(labels)
        if shares is not None and others is not None:
            # Equals the cross-entropy with mixed labels, without a matrix of them.
            shares = shares.to(loss.dtype)
            loss = shares * loss + (1 - shares) * cross_entropy(others)
            labels = torch.where(shares < 0.5, others, labels)
        return {"loss": loss, "accuracy": (logits.detach().argmax(1) == labels).float()}

    def evaluation(self, config: TrainConfig, world: World, validation: Source | None) -> Evaluate | None:
        classes, sets = self._classes, open_sets(config, validation)
        for each in sets:
            key, named = f"eval.sets.{each.name}", each.classnames
            if each.config.metrics not in (None, ("classify",)):
                metrics = ", ".join(each.config.metrics or ())
                raise UserError(f"{key}.metrics must be classify with task.name=classification, got {metrics}")
            if named is not None and len(named) != classes.outputs:
                raise UserError(f"{key}.classes must be the classifier's {classes.outputs}, got {len(named)}")
        transform = OpaqueTransform(self.model.config.image_size, self.model.preprocess)
        spaces = {each.name: _space_of(each, classes) for each in sets}

        def measure(model: VisionModel, stop: Callable[[], bool]) -> tuple[Metrics, list[str]]:
            encoder = DistributedEncoder(_TopLabels(model), world, None, stop)
            return measured(
                model,
                {each.name: partial(_evaluate, encoder, transform, each, spaces[each.name], classes) for each in sets},
            )

        return measure if sets else None

    def flops_per_sample(self, size: Size) -> float:
        config, kept = replace(self.model.config, image_size=size), 1 - self.visual.patch_dropout
        return BACKWARD_FACTOR * vision_flops(config, self.model.num_classes, kept)

    def tokens_computed(self, batch: Batch) -> int:
        """The prefix tokens and the kept patches of each image."""
        return len(batch.targets) * (self.visual.config.prefix_tokens + self.visual.num_kept_patches())

    def stand_ins(self, rows: int, sizes: set[int], fake: Any) -> Tensor:
        labels: Tensor = fake(torch.arange(rows) % self.model.num_classes)
        return labels

    def descriptions(self, config: TrainConfig) -> dict[str, Any]:
        names = self._classes.names
        files = {} if names == _numbers(len(names)) else {CLASSES_FILE: list(names)}
        return describe_image_model(self.model, config, self.model.num_classes) | files


def _space_of(each: EvalSet, classes: ClassSpace) -> ClassSpace:
    """The classes of a set; `classes` are the classifier's."""
    folders = classes.folders if each.config.data is None else each.source.classes
    return ClassSpace.whole(each.classnames or classes.names, folders, classes.names)


def _evaluate(
    encoder: DistributedEncoder,
    transform: EvalTransform,
    each: EvalSet,
    space: ClassSpace,
    classes: ClassSpace,
    attempt: Attempt,
) -> Metrics:
    def metrics() -> Metrics:
        features = encode_everywhere(encoder, transform, each.source, each)
        keys = [each.source.name(int(key)) for key in features.keys]
        labels = torch.tensor(space.columns)[space.labels(features.captions, keys)]
        result = evaluate(Predictions(features.features.long(), labels, keys), classes).accuracy
        return {
            "top1": result.top1,
            "top5": result.top5,
            "chance_top1": result.chance_top1,
            "classes": result.classes,
            "samples": len(features),
            "unreadable": len(each.source) - len(features),
        }

    return attempt(["top1", "top5"], metrics)


class _TopLabels(nn.Module):
    """A classifier that encodes an image as the labels of its highest logits, best first, exact in float32."""

    def __init__(self, model: VisionModel) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        logits = self.model(images).float()
        best = logits.sort(dim=1, descending=True, stable=True).indices[:, :TOP]
        return torch.where(logits.isfinite().all(1, keepdim=True), best.float(), math.nan)


def classes_for(config: TrainConfig) -> ClassSpace:
    """The classes of the labels.

    Raises:
        UserError: neither the configuration nor the data names classes, or they don't fit together.
    """
    choice, folders = _task(config).classes, tuple(classes_of(config.data))
    if choice is None and not folders:
        raise UserError(
            "task.classes must be a number, names, a file with one name a line, or imagenet, as the training data has "
            "no class folders, got None"
        )
    if isinstance(choice, int) and folders and len(folders) != choice:
        raise UserError(f"task.classes must be null or {len(folders)}, as many as class folders, got {choice}")
    if choice is None or isinstance(choice, int):
        # Folders called by numbers are labels: folder 10 holds class 10, though it comes before 2.
        numbers = _numbers(choice or len(folders))
        names = numbers if not folders or set(folders) == set(numbers) else folders
    else:
        names = load_classnames(choice) if isinstance(choice, str) else choice
    return ClassSpace.whole(names, folders)


def _labels(classes: ClassSpace, captions: list[str], seeds: U64) -> Tensor:
    return classes.labels(captions)


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _task(config: TrainConfig) -> ClassificationTask:
    assert isinstance(config.task, ClassificationTask)
    return config.task


def _mixes(task: ClassificationTask) -> bool:
    return bool(task.mixup or task.cutmix)
