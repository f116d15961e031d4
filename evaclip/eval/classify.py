"""Classification by a model's own classifier: top-1 and top-5 of its logits, as timm's `validate` counts them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaclip.data import EvalBatch, Source
from evaclip.errors import UserError
from evaclip.eval.class_space import ClassSpace, validation_number
from evaclip.eval.features import FeatureOptions, for_each_batch
from evaclip.eval.finite import require_finite
from evaclip.eval.ranking import Result, hit_rate
from evaclip.eval.zero_shot import ZeroShotResult, summarize

TOP = 5


@dataclass(frozen=True)
class Predictions:
    """What `predict` gives, in the order of the source; unreadable samples are left out.

    Attributes:
        best: [N, min(5, classes)] int64, the labels of the highest logits, best first.
        labels: [N] int64, the pictures' own.
        keys: the N names of the samples.
    """

    best: Tensor
    labels: Tensor
    keys: list[str]

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class RealResult:
    """Accuracies by reassessed labels, any of which counts, of the pictures that have any."""

    samples: int
    top1: float
    top5: float


@dataclass(frozen=True)
class ClassifyResult(Result):
    """Accuracies as for zero-shot classification, with what is peculiar to a classifier.

    Attributes:
        accuracy: among the classes that the classifier has.
        lacking: the classes that it lacks; their pictures take no part.
        left_out: how many these are.
        real: by reassessed labels, if there are any.
    """

    accuracy: ZeroShotResult
    lacking: tuple[str, ...] = ()
    left_out: int = 0
    real: RealResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        given = super().to_dict()
        return {**given.pop("accuracy"), **given}


def predict(
    model: Callable[[Tensor], Tensor],
    transform: Callable[[Any], Tensor],
    source: Source,
    classes: ClassSpace,
    options: FeatureOptions | None = None,
) -> Predictions:
    """The best classes of all pictures of a source. Of equal logits the one with the lower place counts as the better.

    Args:
        model: a module, from images to logits `[B, classes.outputs]`.
        transform: PIL image to what the model takes, see `LoadedClassifier.transform`.
        source: labelled pictures.
        classes: what their captions and the logits stand for.
        options: the cache is not used.

    Raises:
        NothingReadable: no sample could be read.
        UserError: a caption that is no class, or the model gave NaN or infinity (the sample is named).
    """
    best, labels, keys = list[Tensor](), list[Tensor](), list[str]()

    def take(batch: EvalBatch) -> None:
        labels.append(classes.labels(batch.captions, batch.keys))
        logits = model(batch.images)
        if logits.shape[1:] != (classes.outputs,):
            raise ValueError(f"expected logits [B, {classes.outputs}], got {list(logits.shape)}")
        if classes.chosen is not None:
            logits = logits[:, classes.chosen.to(logits.device)]
        require_finite(logits, batch.keys, "picture")
        order = logits.float().sort(dim=1, descending=True, stable=True).indices
        best.append(classes.places[order[:, :TOP].cpu()])
        keys.extend(batch.keys)

    for_each_batch(model, take, transform, source, options or FeatureOptions())
    return Predictions(torch.cat(best), torch.cat(labels), keys)


def evaluate(found: Predictions, classes: ClassSpace, real: Sequence[frozenset[int]] | None = None) -> ClassifyResult:
    """Top-1, top-5 and mean-per-class accuracy.

    Args:
        found: of all pictures; those of several processes are put together.
        classes: those that `predict` was given.
        real: labels by place in ImageNet's validation set, from `load_real_labels`.

    Raises:
        UserError: no picture is left, or none has a reassessed label.
    """
    rows = torch.isin(found.labels, classes.places).nonzero().flatten()
    if not len(rows):
        raise UserError("there are no pictures of classes that the classifier has")
    best, labels = found.best[rows], found.labels[rows]
    return ClassifyResult(
        summarize(_ranks(best == labels[:, None]), best[:, 0], labels, classes.names, len(classes.places)),
        tuple(classes.lacking),
        len(found) - len(rows),
        None if real is None else _real(best, [real[validation_number(found.keys[row])] for row in rows.tolist()]),
    )


def _real(best: Tensor, labels: Sequence[frozenset[int]]) -> RealResult:
    hits = [[place in own for place in row] for row, own in zip(best.tolist(), labels, strict=True) if own]
    if not hits:
        raise UserError("no picture has a reassessed label")
    ranks = _ranks(torch.tensor(hits))
    return RealResult(len(hits), hit_rate(ranks, 1), hit_rate(ranks, TOP))


def _ranks(hits: Tensor) -> Tensor:
    """[N] the first column that hits, or TOP where none does."""
    return torch.where(hits.any(1), hits.int().argmax(1), TOP)
