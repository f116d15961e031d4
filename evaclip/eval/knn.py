"""k nearest neighbours on frozen features, as DINO measures them (Caron et al. 2021, arXiv 2104.14294)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evaclip.errors import UserError
from evaclip.eval.ranking import Over, Result, here, hit_rate, top_items

NEIGHBOURS = 20
TEMPERATURE = 0.07
_QUERIES = 512
"""That vote at once. Processes share such blocks and never cut one, so that no sum depends on how many they are."""


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


def knn(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    classes: int,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    over: Over = here,
) -> KnnResult:
    """Classifies `test` by the nearest of `train`, each (features [N, width], labels [N] int64 in [0, classes)).

    A neighbour votes for its class by `exp(cosine / temperature)`. Of equally near ones the earlier is a neighbour, and
    of classes with equal votes the lower one wins. A class without a neighbour is in no place, so a miss.

    Args:
        over: has blocks of `test` vote, here or in several processes that all have both sets; the result is the same.

    Raises:
        UserError: one of them is empty.
    """
    (train_features, train_labels), (features, labels) = train, test
    if not len(train_labels) or not len(labels):
        raise UserError(f"k-NN needs pictures to vote and to test on, got {len(train_labels)} and {len(labels)}")
    neighbours = min(neighbours, len(train_labels))
    voting = F.normalize(train_features, dim=1)

    def ranks_from(first: int) -> Tensor:
        """[n] the place of each of a block's own classes."""
        rows = slice(first, first + _QUERIES)
        cosines, nearest = top_items(F.normalize(features[rows], dim=1), voting, neighbours)
        return _places(cosines, train_labels[nearest], labels[rows], classes, temperature)

    ranks = torch.cat(over(range(0, len(labels), _QUERIES), ranks_from))
    return KnnResult(
        train_samples=len(train_labels),
        samples=len(labels),
        classes=classes,
        neighbours=neighbours,
        top1=hit_rate(ranks, 1),
        top5=hit_rate(ranks, 5),
        chance_top1=1 / classes,
    )


def _places(cosines: Tensor, voters: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """[n] the place of each label by the votes of its neighbours, whose classes are `voters` [n, neighbours]."""
    # Of the largest: as weights they are the same, and no power overflows.
    weights = ((cosines.double() - cosines[:, :1]) / temperature).exp()
    # Less than nothing for a class that none votes for; a vote may underflow to 0.
    votes = torch.full((len(labels), classes), -1.0, dtype=torch.float64).scatter_(1, voters, 0.0)
    votes.scatter_add_(1, voters, weights)
    own = votes.gather(1, labels[:, None])
    places = ((votes > own) | ((votes == own) & (torch.arange(classes) < labels[:, None]))).sum(1)
    places[own[:, 0] < 0] = max(classes, 5)
    return places
