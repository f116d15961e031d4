"""What a classifier in training is measured by: top-1 and top-5, by the functions of `evaclip.eval.classify`."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from evaclip.data import Source
from evaclip.errors import UserError
from evaclip.eval.class_space import ClassSpace
from evaclip.eval.classify import TOP, Predictions, evaluate
from evaclip.model.vision_model import VisionModel
from evaclip.train.config import TrainConfig
from evaclip.train.distributed import World
from evaclip.train.evaluation import Attempt, EvalSet, Metrics, encode_everywhere, measured, open_sets
from evaclip.train.spread import Spread
from evaclip.transforms import EvalTransform, OpaqueTransform


def open_classifying(
    config: TrainConfig,
    world: World,
    names: tuple[str, ...],
    folders: tuple[str, ...],
    model: VisionModel,
    held_out: Source | None,
) -> "Classifying | None":
    """The measurement that a configuration asks for; None for one without sets.

    Args:
        names: of the classes, by label.
        folders: the training data's own names of its classes, which the held-out samples have.
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
        if each.classnames is not None and len(each.classnames) != len(names):
            raise UserError(
                f"eval.sets.{each.name}.classes are {len(each.classnames)}, but the classifier has {len(names)}"
            )
    transform = OpaqueTransform(model.config.image_size, model.preprocess)
    spaces = [
        ClassSpace(
            each.classnames or names,
            folders if each.config.data is None else tuple(each.source.classes),
            tuple(range(len(names))),
            len(names),
        )
        for each in sets
    ]
    for space in spaces:
        space.labels(space.folders, space.folders)  # Folders that are no classes are told now.
    return Classifying(list(zip(sets, spaces, strict=True)), transform, world) if sets else None


class Classifying:
    """Measures a classifier on its sets; every process computes its part of each.

    Args:
        sets: with what labels stand for in them.
        transform: a PIL image to a tensor, without augmentation.
        world: the processes that evaluate together.
    """

    def __init__(self, sets: list[tuple[EvalSet, ClassSpace]], transform: EvalTransform, world: World) -> None:
        self._sets = sets
        self._transform = transform
        self._world = world

    def __call__(self, model: VisionModel, stop: Callable[[], bool]) -> tuple[Metrics, list[str]]:
        """The metrics of all sets as `NAME/METRIC`, and a line on each set that could not be measured.

        Raises:
            Stopped: a process was asked to stop.
        """
        spread = Spread(_Best(model), self._world, None, stop)
        return measured(model, {each.name: partial(self._attempt, spread, each, named) for each, named in self._sets})

    def _attempt(self, spread: Spread, each: EvalSet, classes: ClassSpace, attempt: Attempt) -> Metrics:
        return attempt(["top1", "top5"], lambda: self._measure(spread, each, classes))

    def _measure(self, spread: Spread, each: EvalSet, classes: ClassSpace) -> Metrics:
        found = encode_everywhere(spread, self._transform, each.source, each)
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
    """A classifier whose features of a picture are the labels of its highest logits, best first, exact in float32."""

    def __init__(self, model: VisionModel) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        logits = self.model(images).float()
        best = logits.sort(dim=1, descending=True, stable=True).indices[:, :TOP]
        return torch.where(logits.isfinite().all(1, keepdim=True), best.float(), math.nan)
