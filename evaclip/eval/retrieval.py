"""Retrieval both ways, with any number of captions per picture, in blocks (never all scores at once).

The protocol of the Karpathy splits (Flickr30K, COCO): a picture counts as a hit if *any* of its captions lies
within the first k; the recall of the other direction is the average over all captions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaclip.errors import UserError
from evaclip.eval.ranking import BLOCK, Result, hit_rate, target_ranks

CUTOFFS = (1, 5, 10)


@dataclass(frozen=True)
class DirectionResult:
    """One direction.

    Attributes:
        recall: share of queries whose match lies within the first k, by k.
        chance: what a random order reaches, on average, by k.
        mean_rank, median_rank: of the (best) match, counted from 1.
    """

    queries: int
    recall: dict[int, float]
    chance: dict[int, float]
    mean_rank: float
    median_rank: float


@dataclass(frozen=True)
class RetrievalResult(Result):
    """`mean_recall` is the mean of the recalls at 1, 5 and 10 of both directions."""

    images: int
    captions: int
    image_to_text: DirectionResult
    text_to_image: DirectionResult
    mean_recall: float


def evaluate(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor, *, block: int = BLOCK
) -> RetrievalResult:
    """Recall at 1, 5 and 10 both ways. Of equal scores the lower index counts as the better (see `ranking`).

    Args:
        image_features: [N, embed_dim], normalised.
        text_features: [M, embed_dim], normalised.
        image_of_text: [M] int64, the picture that each caption belongs to; every picture has at least one.
        block: rows and columns of the score tiles.
    """
    images, captions = len(image_features), len(text_features)
    if image_of_text.shape != (captions,):
        raise ValueError(
            f"expected one picture index for each of {captions} captions, got {tuple(image_of_text.shape)}"
        )
    captions_per_image = torch.bincount(image_of_text, minlength=images)
    if len(captions_per_image) > images:
        raise ValueError(f"picture indices must lie in [0, {images}), got {len(captions_per_image) - 1}")
    if int((captions_per_image == 0).sum()):
        raise UserError(f"{int((captions_per_image == 0).sum())} of {images} pictures have no caption")
    best_caption = _best_caption(image_features, text_features, image_of_text)
    image_ranks = target_ranks(image_features, text_features, best_caption, block=block)
    text_ranks = target_ranks(text_features, image_features, image_of_text, block=block)
    chance_image = {k: _chance_of_any(captions_per_image, captions, k) for k in CUTOFFS}
    chance_text = {k: min(1.0, k / images) for k in CUTOFFS}
    image_to_text = _direction(image_ranks, chance_image)
    text_to_image = _direction(text_ranks, chance_text)
    recalls = [*image_to_text.recall.values(), *text_to_image.recall.values()]
    return RetrievalResult(images, captions, image_to_text, text_to_image, sum(recalls) / len(recalls))


def _best_caption(image_features: Tensor, text_features: Tensor, image_of_text: Tensor) -> Tensor:
    """[N] int64: each picture's own caption of the highest score, of equal ones the first."""
    scores = torch.empty(len(text_features))
    for start in range(0, len(scores), BLOCK):
        rows = slice(start, start + BLOCK)
        own = image_features[image_of_text[rows]].double()
        scores[rows] = (own * text_features[rows].double()).sum(1).float()
    # Sorted by picture, then by falling score; both sorts are stable, so equal scores stay in index order.
    order = scores.argsort(descending=True, stable=True)
    order = order[image_of_text[order].argsort(stable=True)]
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = image_of_text[order][1:] != image_of_text[order][:-1]
    return order[first]


def _direction(ranks: Tensor, chance: dict[int, float]) -> DirectionResult:
    return DirectionResult(
        queries=len(ranks),
        recall={k: hit_rate(ranks, k) for k in CUTOFFS},
        chance=chance,
        mean_rank=float(ranks.double().mean()) + 1,
        median_rank=float(np.median(ranks.numpy())) + 1,
    )


def _chance_of_any(captions_per_image: Tensor, captions: int, k: int) -> float:
    """Mean of 1 - C(captions - own, k) / C(captions, k): at least one own caption among k drawn."""
    own = captions_per_image.double()
    missed = torch.ones_like(own)
    for drawn in range(min(k, captions)):
        missed *= ((captions - own - drawn) / (captions - drawn)).clamp(min=0)
    return float((1 - missed).mean())
