"""What masked image modelling is measured by: labels from frozen features, and the loss of pictures held out."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from evaclip.data import Source, open_configured
from evaclip.errors import UserError
from evaclip.eval.classify import assign_labels
from evaclip.eval.probes import KnnResult, LinearProbeResult, knn, linear_probe
from evaclip.model.masked_image import MaskedImageModel
from evaclip.train.config import Measure, TrainConfig
from evaclip.train.distributed import World
from evaclip.train.distributed_encoder import DistributedEncoder
from evaclip.train.evaluation import Attempt, EvalSet, Metrics, encode_everywhere, measured, open_sets
from evaclip.train.tasks.teacher import Teacher, similarity
from evaclip.transforms import EvalTransform

_METRICS: dict[Measure, str] = {"linear_probe": "linear_probe_top1", "knn": "knn_top1", "loss": "loss"}


@dataclass(frozen=True)
class _Probe:
    """An evaluation set, the labelled images for its classes, and its measures."""

    tested: EvalSet
    fit: Source | None
    measures: tuple[Measure, ...]


def open_probing(
    config: TrainConfig, world: World, teacher: Teacher, transform: EvalTransform, held_out: Source | None
) -> "Probing | None":
    """The measurement that a configuration asks for; None for one without sets.

    Raises:
        UserError: a set isn't there, or is to be measured by what an image model can't do.
    """
    probes = [_open(each) for each in open_sets(config, held_out)]
    return Probing(probes, world, teacher, transform) if probes else None


def _open(each: EvalSet) -> _Probe:
    fit = each.config.fit
    measures: tuple[Measure, ...] = each.config.measure or (("loss",) if fit is None else ("knn",))
    strange = [measure for measure in measures if measure not in _METRICS]
    if strange:
        raise UserError(
            f"eval.sets.{each.name}.measure is {', '.join(strange)}, which needs texts; with task.name=masked_image it "
            f"is one of {', '.join(_METRICS)}"
        )
    if fit is None and measures != ("loss",):
        raise UserError(f"eval.sets.{each.name}.fit is not set: name labelled pictures that {measures[0]} learns from")
    return _Probe(each, None if fit is None else open_configured(replace(fit, caption_template="{}")), measures)


@dataclass(frozen=True)
class Probing:
    """Measures a student on its sets; every process encodes its part of each. `transform` is without augmentation."""

    probes: list[_Probe]
    world: World
    teacher: Teacher
    transform: EvalTransform

    def __call__(self, model: MaskedImageModel, stop: Callable[[], bool]) -> tuple[Metrics, list[str]]:
        """The metrics of all sets as `NAME/METRIC`, and a line on each measurement that failed; others go on.

        Raises:
            Stopped: a process was asked to stop.
        """
        return measured(model, {each.tested.name: partial(self._measure, each, model, stop) for each in self.probes})

    def _measure(self, probe: _Probe, model: MaskedImageModel, stop: Callable[[], bool], attempt: Attempt) -> Metrics:
        metrics: Metrics = {}
        if "loss" in probe.measures:
            metrics |= attempt(["loss"], partial(self._loss, probe.tested, model, stop))
        if by_labels := [_METRICS[measure] for measure in probe.measures if measure != "loss"]:
            encoder = DistributedEncoder(model, self.world, None, stop)
            metrics |= attempt(by_labels, partial(self._classify, probe, encoder, attempt))
        return metrics

    def _loss(self, each: EvalSet, model: MaskedImageModel, stop: Callable[[], bool]) -> Metrics:
        encoder = DistributedEncoder(_Loss(model, self.teacher), self.world, None, stop)
        found = encode_everywhere(encoder, self.transform, each.source, each)
        return {"loss": found.features.double().mean().item(), "samples": len(found)}

    def _classify(self, probe: _Probe, encoder: DistributedEncoder, attempt: Attempt) -> Metrics:
        each, fit = probe.tested, probe.fit
        assert fit is not None
        assert each.config.fit is not None
        learning = replace(each, options=replace(each.options, workers=each.config.fit.workers))
        fitted = encode_everywhere(encoder, self.transform, fit, learning)
        tested = encode_everywhere(encoder, self.transform, each.source, each)
        names = [each.source.name(int(key)) for key in tested.keys]
        known = assign_labels(fitted.captions, fitted.keys, each.classnames, fit.classes)
        labels = assign_labels(tested.captions, names, known.classnames, each.source.classes)
        data = (fitted.features, known.indices), (tested.features, labels.indices)
        classes = len(known.classnames)
        metrics: Metrics = {"samples": len(tested), "fit_samples": len(fitted), "classes": classes}
        if "knn" in probe.measures:
            metrics |= attempt([_METRICS["knn"]], lambda: _tops("knn", knn(*data, classes=classes, over=encoder.over)))
        if "linear_probe" in probe.measures:
            metrics |= attempt(
                [_METRICS["linear_probe"]],
                lambda: _tops("linear_probe", linear_probe(*data, classes=classes, over=encoder.over)),
            )
        return metrics


def _tops(name: str, result: KnnResult | LinearProbeResult) -> Metrics:
    return {f"{name}_top1": result.top1, f"{name}_top5": result.top5}


class _Loss(nn.Module):
    """A student that encodes an image as its loss with every second patch masked, the authors' measure."""

    def __init__(self, model: MaskedImageModel, teacher: Teacher) -> None:
        super().__init__()
        self.student = model
        self.config = model.config
        self._teacher = teacher

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        images = images.to(self._teacher.tower.cls_token.device)  # an offloaded student is in host memory
        grid = self.student.present.grid
        masked = torch.arange(0, self.student.num_patches, 2, device=images.device).expand(len(images), -1)
        wanted = self._teacher(images, grid)[:, ::2].flatten(0, 1)
        cosines: Tensor = similarity(self.student(images, masked), wanted).unflatten(0, masked.shape)
        return -cosines.mean(1, keepdim=True)
