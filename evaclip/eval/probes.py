"""Probes of frozen features: k nearest neighbours (arXiv 2104.14294) and logistic regression."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaclip.errors import UserError
from evaclip.eval.ranking import Over, Result, hit_rate, map_locally, top_items

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

NEIGHBOURS = 20
TEMPERATURE = 0.07
HELD_OUT = 0.2
"""Share of the training data on which the strength of the linear probe is chosen."""
STRENGTHS = tuple(10.0**power for power in range(-2, 5))
"""Inverse regularization strengths C; features have length 1, so useful values are large."""
_QUERIES = 512
"""Queries per block. Ranks share whole blocks, so that no sum depends on the number of ranks."""


@dataclass(frozen=True)
class KnnResult(Result):
    """Accuracies in [0, 1] on the test set, by the votes of `neighbours` training samples."""

    train_samples: int
    samples: int
    classes: int
    neighbours: int
    top1: float
    top5: float
    chance_top1: float


@dataclass(frozen=True)
class LinearProbeResult(Result):
    """Accuracies in [0, 1] on the test set.

    Attributes:
        strength: the chosen C.
        held_out: accuracy on the held-out part by C; the probe of the chosen C is then fitted to all training data.
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


def knn(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    classes: int,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    over: Over = map_locally,
) -> KnnResult:
    """Classify `test` by the nearest of `train`, each (features [N, width], labels [N] int64 in [0, classes)).

    A neighbour votes for its class with weight `exp(cosine / temperature)`. Of equally near samples the earlier one is
    the neighbour; of classes with equal votes the lower label wins. A class without votes counts as a miss.

    Args:
        over: maps blocks of `test`, in this process or over ranks that all have both sets; the result is the same.

    Raises:
        UserError: one of them is empty.
    """
    (train_features, train_labels), (features, labels) = train, test
    if not len(train_labels) or not len(labels):
        raise UserError(f"k-NN needs images to vote and to test on, got {len(train_labels)} and {len(labels)}")
    neighbours = min(neighbours, len(train_labels))
    voting = F.normalize(train_features, dim=1)

    def ranks_of_block(first: int) -> Tensor:
        rows = slice(first, first + _QUERIES)
        cosines, nearest = top_items(F.normalize(features[rows], dim=1), voting, neighbours)
        # Relative to the largest cosine: the ratios of the weights stay, and no power overflows.
        weights = ((cosines.double() - cosines[:, :1]) / temperature).exp()
        # Below 0 for a class without votes; a vote may underflow to 0.
        votes = torch.full((len(cosines), classes), -1.0, dtype=torch.float64)
        voters = train_labels[nearest]
        votes.scatter_(1, voters, 0.0).scatter_add_(1, voters, weights)
        ranks, own = _label_ranks(votes, labels[rows])
        ranks[own < 0] = max(classes, 5)
        return ranks

    ranks = torch.cat(over(range(0, len(labels), _QUERIES), ranks_of_block))
    return KnnResult(
        train_samples=len(train_labels),
        samples=len(labels),
        classes=classes,
        neighbours=neighbours,
        top1=hit_rate(ranks, 1),
        top5=hit_rate(ranks, 5),
        chance_top1=1 / classes,
    )


def linear_probe(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    classes: int,
    seed: int = 0,
    max_iter: int = 1000,
    over: Over = map_locally,
) -> LinearProbeResult:
    """Fit logistic regression to `train` and score `test`; both as for `knn`.

    Args:
        over: maps the strengths, as for `knn`.

    Raises:
        UserError: fewer than two classes besides the held-out part, or fewer than ten images, to train on; nothing to
            test on.
    """
    features, labels = train
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out, fitted = order.tensor_split([round(len(order) * HELD_OUT)])
    present = len(labels[fitted].unique())
    if present < 2 or len(labels) < 10:
        raise UserError(
            "a linear probe needs two classes, without the fifth that is held out, and ten images to train on, got "
            f"{present} and {len(labels)}"
        )
    if not len(test[1]):
        raise UserError("a linear probe needs images to test on")

    def accuracy_with(strength: float) -> float:
        probe = _fit(features[fitted], labels[fitted], strength, max_iter)
        return hit_rate(_probe_ranks(probe, features[held_out], labels[held_out], classes), 1)

    accuracy = dict(zip(STRENGTHS, over(STRENGTHS, accuracy_with), strict=True))
    best = max(STRENGTHS, key=lambda strength: accuracy[strength])
    (ranks,) = over([best], lambda strength: _probe_ranks(_fit(features, labels, strength, max_iter), *test, classes))
    return LinearProbeResult(
        train_samples=len(labels),
        samples=len(ranks),
        classes=classes,
        top1=hit_rate(ranks, 1),
        top5=hit_rate(ranks, 5),
        mean_per_class=float(np.mean([hit_rate(ranks[test[1] == label], 1) for label in test[1].unique()])),
        chance_top1=1 / classes,
        strength=best,
        held_out=accuracy,
    )


def _fit(features: Tensor, labels: Tensor, strength: float, max_iter: int) -> "LogisticRegression":
    # Imported here so that other evaluations don't wait for scikit-learn.
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=max_iter).fit(features.double().numpy(), labels.numpy())


def _probe_ranks(probe: "LogisticRegression", features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Rank of the true class among all, `[N]`; a class that wasn't in the training data comes last."""
    decisions = probe.decision_function(features.double().numpy())
    if decisions.ndim == 1:
        decisions = np.stack([-decisions, decisions], 1)
    scores = torch.full((len(labels), classes), -float("inf"), dtype=torch.float64)
    scores[:, torch.from_numpy(probe.classes_)] = torch.from_numpy(decisions)
    return _label_ranks(scores, labels)[0]


def _label_ranks(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each label by `scores` `[N, classes]`, of equal scores the lower label first; and the label's score."""
    own = scores.gather(1, labels[:, None])
    first = (scores > own) | ((scores == own) & (torch.arange(scores.shape[1]) < labels[:, None]))
    return first.sum(1), own[:, 0]
