"""What a classifier in training is measured by: top-1 and top-5, by the functions of `evaclip.eval.classify`."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from evaclip.data import Source
from evaclip.errors import UserError
from evaclip.eval.classify import TOP, ClassSpace, Predictions, evaluate
from evaclip.model.vision_model import VisionModel
from evaclip.train.config import TrainConfig
from evaclip.train.distributed import World
from evaclip.train.distributed_encoder import DistributedEncoder
from evaclip.train.evaluation import Attempt, EvalSet, Metrics, encode_everywhere, measured, open_sets
from evaclip.train.tasks.task import Evaluate
from evaclip.transforms import EvalTransform, OpaqueTransform


def open_classifying(
    config: TrainConfig, world: World, classes: ClassSpace, model: VisionModel, held_out: Source | None
) -> Evaluate | None:
    """The measurement that a configuration asks for; None for one without sets.

    Args:
        classes: of the training data and the validation split.
        held_out: samples that are held out of the training data.

    Raises:
        UserError: a set isn't there, or is to be measured by what needs texts.
    """
    sets = open_sets(config, held_out)
    for each in sets:
        if each.config.measure not in (None, ("classify",)):
            raise UserError(
                f"eval.sets.{each.name}.measure is {', '.join(each.config.measure or ())}; with "
                "task.name=classification it is classify, or left out"
            )
        if each.classnames is not None and len(each.classnames) != classes.outputs:
            raise UserError(
                f"eval.sets.{each.name}.classes are {len(each.classnames)}, but the classifier has {classes.outputs}"
            )
    transform = OpaqueTransform(model.config.image_size, model.preprocess)
    spaces = [
        ClassSpace.whole(
            each.classnames or classes.names, classes.folders if each.config.data is None else each.source.classes
        )
        for each in sets
    ]

    def measure(model: VisionModel, stop: Callable[[], bool]) -> tuple[Metrics, list[str]]:
        encoder = DistributedEncoder(_Best(model), world, None, stop)
        pairs = zip(sets, spaces, strict=True)
        return measured(model, {each.name: partial(_attempt, encoder, transform, each, named) for each, named in pairs})

    return measure if sets else None


def _attempt(
    encoder: DistributedEncoder, transform: EvalTransform, each: EvalSet, classes: ClassSpace, attempt: Attempt
) -> Metrics:
    return attempt(["top1", "top5"], lambda: _measure(encoder, transform, each, classes))


def _measure(encoder: DistributedEncoder, transform: EvalTransform, each: EvalSet, classes: ClassSpace) -> Metrics:
    found = encode_everywhere(encoder, transform, each.source, each)
    keys = [each.source.name(int(key)) for key in found.keys]
    labels = classes.labels(found.captions, keys)
    result = evaluate(Predictions(found.features.long(), labels, keys), classes).accuracy
    return {
        "top1": result.top1,
        "top5": result.top5,
        "chance_top1": result.chance_top1,
        "classes": result.classes,
        "samples": len(found),
        "unreadable": len(each.source) - len(found),
    }


class _Best(nn.Module):
    """A classifier that encodes an image as the labels of its highest logits, best first, exact in float32."""

    def __init__(self, model: VisionModel) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        logits = self.model(images).float()
        best = logits.sort(dim=1, descending=True, stable=True).indices[:, :TOP]
        return torch.where(logits.isfinite().all(1, keepdim=True), best.float(), math.nan)
