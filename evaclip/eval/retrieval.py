"""Retrieval both ways, with any number of captions per image, in blocks (never all scores at once).

The protocol of the Karpathy splits (Flickr30K, COCO): an image counts as a hit if *any* of its captions is
among the first k; the recall of the other direction is the average over all captions.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaclip.data import BadSample, Source
from evaclip.data.samples import FaultLog, decode_image
from evaclip.data.validation import Selection
from evaclip.errors import UserError
from evaclip.eval.features import FeatureOptions, ImageTextModel, Tokenizer, encode_images, encode_texts
from evaclip.eval.ranking import BLOCK, Over, Result, hit_rate, map_locally, target_ranks

CUTOFFS = (1, 5, 10)


@dataclass
class Picture:
    """A distinct image of a source: its first sample, the captions of all its samples, and the number of these."""

    index: int
    captions: list[str]
    samples: int = 1


@dataclass(frozen=True)
class EncodedPairs:
    """Features of all distinct images and all their captions.

    Attributes:
        image_features: [N, embed_dim]; text_features: [M, embed_dim].
        image_of_text: [M] int64, the image of each caption.
        indices: samples of the N images in the source.
        texts: the M captions.
        unreadable: number of samples of the source that could not be used.
    """

    source: Source
    image_features: Tensor
    text_features: Tensor
    image_of_text: Tensor
    indices: list[int]
    texts: list[str]
    unreadable: int

    def key(self, image: int) -> str:
        """The key of one of the N images."""
        return self.source[self.indices[image]].key

    def picture(self, image: int) -> Image.Image:
        """One of the N images, decoded."""
        index = self.indices[image]
        return decode_image(self.source[index].image, self.source.name(index), self.source.decoding)


def encode_pairs(
    model: ImageTextModel,
    tokenizer: Tokenizer,
    transform: Callable[[Any], Any],
    source: Source,
    options: FeatureOptions | None = None,
) -> EncodedPairs:
    """Encode each distinct image once and each of its captions.

    Samples with the same image bytes are one image with the captions of all of them. So a table with one row per
    caption works like samples with lists of captions.

    Raises:
        UserError: nothing could be read.
    """
    images = {image.index: image for image in distinct_pictures(source, range(len(source))).values()}
    if not images:
        raise UserError(f"none of the {len(source)} samples of {source.description} could be read")
    encoded = encode_images(model, transform, Selection(source, list(images)), options)
    indices = [int(key) for key in encoded.keys]
    captions = [caption for index in indices for caption in images[index].captions]
    image_of_text = [image for image, index in enumerate(indices) for _ in images[index].captions]
    return EncodedPairs(
        source,
        encoded.features,
        encode_texts(model, tokenizer, captions, options),
        torch.tensor(image_of_text, dtype=torch.int64),
        indices,
        captions,
        len(source) - sum(images[index].samples for index in indices),
    )


def distinct_pictures(source: Source, indices: Iterable[int]) -> dict[bytes, Picture]:
    """Distinct images of these samples by a hash of their bytes; unreadable samples are logged and left out."""
    images: dict[bytes, Picture] = {}
    faults = FaultLog()
    faults.add(source.faults)
    for index in indices:
        try:
            sample = source[index]
        except BadSample as exc:
            faults.add([exc.fault])
            continue
        merge(images, {hashlib.sha256(sample.image).digest(): Picture(index, list(sample.captions))})
    return images


def merge(images: dict[bytes, Picture], others: Mapping[bytes, Picture]) -> None:
    """Add images of later samples, or their captions where the image is known."""
    for digest, other in others.items():
        known = images.setdefault(digest, Picture(other.index, [], 0))
        known.captions += dict.fromkeys(caption for caption in other.captions if caption not in known.captions)
        known.samples += other.samples


@dataclass(frozen=True)
class DirectionResult:
    """One direction.

    Attributes:
        recall: share of queries with a match within the first k, by k.
        chance: expected recall of a random order, by k.
        mean_rank, median_rank: of the (best) match, from 1.
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
    image_features: Tensor,
    text_features: Tensor,
    image_of_text: Tensor,
    *,
    block: int = BLOCK,
    over: Over = map_locally,
) -> RetrievalResult:
    """Recall at 1, 5 and 10 both ways. Of equal scores the lower index wins (see `ranking`).

    Args:
        image_features: [N, embed_dim], normalized.
        text_features: [M, embed_dim], normalized.
        image_of_text: [M] int64, the image of each caption; every image has at least one.
        block: rows and columns of the score tiles.
        over: maps a function over the blocks of queries.
    """
    images, captions = len(image_features), len(text_features)
    if image_of_text.shape != (captions,):
        raise ValueError(f"expected one image index for each of {captions} captions, got {tuple(image_of_text.shape)}")
    captions_per_image = torch.bincount(image_of_text, minlength=images)
    if len(captions_per_image) > images:
        raise ValueError(f"image indices must be in [0, {images}), got {len(captions_per_image) - 1}")
    if without := int((captions_per_image == 0).sum()):
        raise UserError(f"{without} of {images} images have no caption")
    best_caption = _best_caption(image_features, text_features, image_of_text)
    image_ranks = target_ranks(image_features, text_features, best_caption, block=block, over=over)
    text_ranks = target_ranks(text_features, image_features, image_of_text, block=block, over=over)
    image_to_text = _direction(image_ranks, {k: _chance_of_any(captions_per_image, captions, k) for k in CUTOFFS})
    text_to_image = _direction(text_ranks, {k: min(1.0, k / images) for k in CUTOFFS})
    recalls = [*image_to_text.recall.values(), *text_to_image.recall.values()]
    return RetrievalResult(images, captions, image_to_text, text_to_image, sum(recalls) / len(recalls))


def _best_caption(image_features: Tensor, text_features: Tensor, image_of_text: Tensor) -> Tensor:
    """Each image's own caption of the highest score, `[N]` int64; of equal scores the first."""
    scores = torch.empty(len(text_features))
    for start in range(0, len(scores), BLOCK):
        rows = slice(start, start + BLOCK)
        own = image_features[image_of_text[rows]].double()
        scores[rows] = (own * text_features[rows].double()).sum(1).float()
    # Sorted by image, then by falling score; both sorts are stable, so equal scores stay in index order.
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
