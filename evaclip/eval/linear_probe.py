"""Linear probe: logistic regression on frozen features, its strength chosen on held-out training data."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from evaclip.errors import UserError
from evaclip.eval.ranking import Over, Result, here, hit_rate

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

HELD_OUT = 0.2
STRENGTHS = tuple(10.0**power for power in range(-2, 5))
"""Inverse regularisation strengths C; features have length 1, so that useful values are large."""


@dataclass(frozen=True)
class LinearProbeResult(Result):
    """Accuracies in [0, 1] on the test set.

    Attributes:
        strength: the chosen C.
        held_out: accuracy on the held-out part by C; the chosen C then saw the whole training set.
    """

    train_samples: int
    samples: int
    classes: int
    top1: float
    top5: float
    mean_per_class: float
    chance_top1: float
    strength: float
    held_out: dict[float, float]


def linear_probe(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    classes: int,
    seed: int = 0,
    max_iter: int = 1000,
    over: Over = here,
) -> LinearProbeResult:
    """Fits on `train` and scores on `test`, each (features [N, embed_dim], labels [N] int64 in [0, classes)).

    Args:
        over: has each strength fitted, here or in several processes that all have both sets, as `knn` takes it.

    Raises:
        UserError: fewer than two classes beside what is held out, or fewer than ten pictures, to train on; nothing to
            test on.
    """
    features, labels = train
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    cut = round(len(order) * HELD_OUT)
    held_out, fitted = order[:cut], order[cut:]
    present = len(_present(labels[fitted]))
    if present < 2 or len(labels) < 10:
        raise UserError(
            "a linear probe needs two classes, without the fifth that is held out, and ten pictures to train on, got "
            f"{present} and {len(labels)}"
        )
    if not len(test[1]):
        raise UserError("a linear probe needs pictures to test on")

    def accuracy_with(strength: float) -> float:
        probe = _fit(features[fitted], labels[fitted], strength, max_iter)
        return hit_rate(_ranks(probe, features[held_out], labels[held_out], classes), 1)

    accuracy = dict(zip(STRENGTHS, over(STRENGTHS, accuracy_with), strict=True))
    best = max(STRENGTHS, key=lambda strength: accuracy[strength])
    (ranks,) = over([best], lambda strength: _ranks(_fit(features, labels, strength, max_iter), *test, classes))
    return LinearProbeResult(
        train_samples=len(labels),
        samples=len(ranks),
        classes=classes,
        top1=hit_rate(ranks, 1),
        top5=hit_rate(ranks, 5),
        mean_per_class=float(np.mean([hit_rate(ranks[test[1] == label], 1) for label in _present(test[1])])),
        chance_top1=1 / classes,
        strength=best,
        held_out=accuracy,
    )


def _present(labels: Tensor) -> list[int]:
    """The classes that occur."""
    classes: list[int] = torch.bincount(labels).nonzero().flatten().tolist()
    return classes


def _fit(features: Tensor, labels: Tensor, strength: float, max_iter: int) -> "LogisticRegression":
    # Imported here so that the other evaluations don't wait for scikit-learn.
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=max_iter).fit(features.double().numpy(), labels.numpy())


def _ranks(probe: "LogisticRegression", features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Place of the right class among all; a class that the probe never saw comes last."""
    decisions = probe.decision_function(features.double().numpy())
    if decisions.ndim == 1:
        decisions = np.stack([-decisions, decisions], 1)
    scores = torch.full((len(labels), classes), -float("inf"), dtype=torch.float64)
    scores[:, torch.from_numpy(probe.classes_)] = torch.from_numpy(decisions)
    own = scores.gather(1, labels[:, None])
    index = torch.arange(classes)
    return ((scores > own) | ((scores == own) & (index < labels[:, None]))).sum(1)
