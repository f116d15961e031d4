"""Pictures with all their captions, however a source lists them."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from evaclip.data import BadSample, Source
from evaclip.data.faults import FaultLog
from evaclip.data.held_out import Selection
from evaclip.data.samples import decode_image
from evaclip.errors import UserError
from evaclip.eval.features import FeatureOptions, ImageTextModel, Tokenizer, encode_images, encode_texts


@dataclass
class Picture:
    """A picture of a source: the first sample that has it, the captions of all that do, and how many these are."""

    index: int
    captions: list[str]
    samples: int = 1


@dataclass(frozen=True)
class EncodedPairs:
    """The features of all pictures and all their captions.

    Attributes:
        image_features: [N, embed_dim]; text_features: [M, embed_dim].
        image_of_text: [M] int64, the picture that each caption belongs to.
        indices: the N pictures' places in the source.
        texts: the M captions.
        unreadable: samples of the source that could not be used.
    """

    source: Source
    image_features: Tensor
    text_features: Tensor
    image_of_text: Tensor
    indices: list[int]
    texts: list[str]
    unreadable: int

    def key(self, image: int) -> str:
        """The key of one of the N pictures."""
        return self.source[self.indices[image]].key

    def picture(self, image: int) -> Image.Image:
        """One of the N pictures."""
        index = self.indices[image]
        return decode_image(self.source[index].image, self.source.name(index), self.source.decoding)


def encode_pairs(
    model: ImageTextModel,
    tokenizer: Tokenizer,
    transform: Callable[[Any], Tensor],
    source: Source,
    options: FeatureOptions | None = None,
) -> EncodedPairs:
    """Encodes each distinct picture once and each of its captions.

    Samples whose picture files have the same bytes are one picture with the captions of all of them, so that
    a table with one row per caption is understood as well as samples with a list of captions.

    Raises:
        UserError: nothing could be read.
    """
    found = distinct_pictures(source, range(len(source)))
    pictures = {picture.index: picture for picture in found.values()}
    if not pictures:
        raise UserError(f"none of the {len(source)} samples of {source.description} could be read")
    images = encode_images(model, transform, Selection(source, list(pictures)), options)
    indices = [int(key) for key in images.keys]
    texts = [text for index in indices for text in pictures[index].captions]
    image_of_text = [image for image, index in enumerate(indices) for _ in pictures[index].captions]
    return EncodedPairs(
        source,
        images.features,
        encode_texts(model, tokenizer, texts, options),
        torch.tensor(image_of_text, dtype=torch.int64),
        indices,
        texts,
        len(source) - sum(pictures[index].samples for index in indices),
    )


def distinct_pictures(source: Source, indices: Iterable[int]) -> dict[bytes, Picture]:
    """The pictures of these samples by a hash of their bytes. Samples that can't be read are logged and left out."""
    pictures: dict[bytes, Picture] = {}
    faults = FaultLog()
    faults.add(source.faults)
    for index in indices:
        try:
            sample = source[index]
        except BadSample as exc:
            faults.add([exc.fault])
            continue
        merge(pictures, {hashlib.sha256(sample.image).digest(): Picture(index, list(sample.captions))})
    return pictures


def merge(pictures: dict[bytes, Picture], others: Mapping[bytes, Picture]) -> None:
    """Adds pictures of later samples, or their captions where the picture is known."""
    for digest, other in others.items():
        known = pictures.setdefault(digest, Picture(other.index, [], 0))
        known.captions += dict.fromkeys(caption for caption in other.captions if caption not in known.captions)
        known.samples += other.samples
