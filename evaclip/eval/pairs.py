"""Pictures with all their captions, however a source lists them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from evaclip.data import BadSample, RawSample, Source
from evaclip.data.faults import FaultLog
from evaclip.data.samples import decode_image
from evaclip.data.source import hash_list
from evaclip.errors import UserError
from evaclip.eval.features import FeatureOptions, ImageTextModel, Tokenizer, encode_images, encode_texts


class Selection(Source):
    """Some samples of another source, in the given order; a sample's key is its index in that source."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self._source = source
        self._indices = list(indices)
        self.description = source.description
        self.decoding = source.decoding
        self.fingerprint = hash_list(source.fingerprint, (("", index) for index in self._indices))
        self.shard_sizes = [len(self._indices)]

    def __getitem__(self, index: int) -> RawSample:
        sample = self._source[self._indices[index]]
        return RawSample(str(self._indices[index]), sample.image, sample.captions)

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])

    def close(self) -> None:
        self._source.close()


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
    pictures = _pictures(source)
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


@dataclass
class _Picture:
    """The distinct captions of a picture, and how many samples it is that of."""

    captions: list[str] = field(default_factory=list)
    samples: int = 0


def _pictures(source: Source) -> dict[int, _Picture]:
    """The pictures by the index of their first sample. Samples that cannot be read are logged and left out."""
    first: dict[bytes, int] = {}
    pictures: dict[int, _Picture] = {}
    faults = FaultLog()
    faults.add(source.faults)
    for index in range(len(source)):
        try:
            sample = source[index]
        except BadSample as exc:
            faults.add([exc.fault])
            continue
        picture = pictures.setdefault(first.setdefault(hashlib.sha256(sample.image).digest(), index), _Picture())
        picture.captions += [caption for caption in sample.captions if caption not in picture.captions]
        picture.samples += 1
    return pictures
