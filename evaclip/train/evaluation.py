"""Evaluation while training and at its end, by the functions of `evaclip.eval`: zero-shot classification and retrieval.

Zero-shot asks which of all distinct captions belongs to each picture; retrieval finds captions by picture and pictures
by caption, all captions of a picture counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from evaclip.data import RawSample, Source
from evaclip.data.held_out import Selection
from evaclip.errors import UserError
from evaclip.eval import retrieval
from evaclip.eval.features import (
    ALLOWED_UNREADABLE,
    FeatureOptions,
    ImageFeatures,
    NothingReadable,
    encode_images,
    refuse_rest,
)
from evaclip.eval.pairs import Picture, distinct_pictures, merge
from evaclip.eval.zero_shot import build_classifier, evaluate
from evaclip.model.clip import CLIP
from evaclip.train.config import EvalConfig, Precision
from evaclip.train.distributed import World
from evaclip.weights import is_sharded

Metrics = dict[str, float]
Result = TypeVar("Result")

_AUTOCAST = {"amp_bf16": "bf16", "amp_fp16": "fp16"}
_PLAIN = ("{}",)


class Evaluation:
    """Scores a model on a source whose captions are the class names; every process encodes its part of both.

    Args:
        source: the evaluation set.
        config: which part of it, and the prompts.
        tokenizer: texts to tokens.
        transform: a PIL image to a tensor, without augmentation.
        options: how features are computed; see `feature_options`.
        world: the processes that evaluate together.
    """

    def __init__(
        self,
        source: Source,
        config: EvalConfig,
        tokenizer: Callable[[list[str]], Tensor],
        transform: Callable[[Any], Tensor],
        options: FeatureOptions,
        world: World,
    ) -> None:
        self._source = _Part(source, config.first, config.samples)
        self._world = world
        self._templates = config.templates
        self._allowed = 1.0 if config.allow_unreadable else ALLOWED_UNREADABLE
        self._tokenizer = tokenizer
        self._transform = transform
        self._options = options
        self._pictures: list[Picture] | None = None

    def __call__(self, model: CLIP) -> Metrics:
        """Top-1 and top-5 accuracy, the accuracy of guessing, over how many pictures and classes that is, and how many
        could not be read; the recalls at 1 and 5 of retrieval, unless captions are names of classes: most of them then
        belong to several pictures, and to find one picture's own means nothing.

        Raises:
            Refused: more samples could not be read than the configuration allows.
            NothingReadable: none could.
        """
        clip = _InStep(model, self._world) if is_sharded(model) else model
        found = [part for part in self._everywhere(clip, partial(self._encode, clip), self._blank_image) if part]
        captions = [caption for part in found for caption in part.captions]
        unreadable = len(self._source) - len(captions)
        refuse_rest(self._source, unreadable, self._allowed, "eval.allow_unreadable=true")
        if not found:
            raise NothingReadable(f"none of the {unreadable:,} samples of {self._source.description} could be read")
        names = sorted(set(captions))
        number = {name: i for i, name in enumerate(names)}
        classifier = self._encode_texts(clip, names, self._templates)
        features = torch.cat([part.features for part in found])
        result = evaluate(features, torch.tensor([number[caption] for caption in captions]), classifier, names)
        metrics: Metrics = {
            "zero_shot_top1": result.top1,
            "zero_shot_top5": result.top5,
            "chance_top1": result.chance_top1,
            "samples": result.samples,
            "classes": result.classes,
            "unreadable": unreadable,
        }
        pairs = self._pairs(clip, [int(key) for part in found for key in part.keys])
        texts = sorted(set(pairs.texts))
        if 2 * len(texts) < len(pairs.texts):
            return metrics
        # Where there is one caption a picture and no template, they are encoded already.
        is_known = texts == names and self._templates == _PLAIN
        return metrics | _recalls(pairs, features, texts, classifier if is_known else self._encode_texts(clip, texts))

    def _encode(self, clip: Any) -> ImageFeatures | None:
        """Of this process's part; keys are the samples' numbers."""
        mine = self._share(range(len(self._source)))
        if not mine:
            return None
        try:
            return encode_images(clip, self._transform, Selection(self._source, mine), self._options)
        except NothingReadable:
            return None

    def _encode_texts(self, clip: Any, texts: list[str], templates: Sequence[str] = _PLAIN) -> Tensor:
        """Normalised features [texts, embed_dim], each the mean over the templates."""
        action = partial(self._encode_my_texts, clip, texts, templates)
        return torch.cat(self._everywhere(clip, action, self._blank_text))

    def _encode_my_texts(self, clip: Any, texts: list[str], templates: Sequence[str]) -> Tensor:
        mine = self._share(texts)
        if not mine:
            return torch.empty(0, clip.config.embed_dim)
        return build_classifier(clip, self._tokenizer, mine, templates, replace(self._options, workers=0))

    def _pairs(self, clip: Any, numbers: list[int]) -> "_Pairs":
        """The distinct pictures among the samples that were encoded, and their captions."""
        if self._pictures is None:
            mine = partial(distinct_pictures, self._source, self._share(range(len(self._source))))
            everywhere: dict[bytes, Picture] = {}
            for part in self._everywhere(clip, mine, self._blank_image):
                merge(everywhere, part)
            self._pictures = list(everywhere.values())
        row = {sample: i for i, sample in enumerate(numbers)}
        pictures = [picture for picture in self._pictures if picture.index in row]
        return _Pairs(
            [row[picture.index] for picture in pictures],
            [text for picture in pictures for text in picture.captions],
            [image for image, picture in enumerate(pictures) for _ in picture.captions],
        )

    def _share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This process's part, next to those of the others."""
        rank, size = self._world.rank, self._world.size
        return items[len(items) * rank // size : len(items) * (rank + 1) // size]

    def _blank_image(self, model: CLIP) -> Tensor:
        return model.encode_image(torch.zeros(1, 3, *model.config.vision.image_shape, device=self._world.device))

    def _blank_text(self, model: CLIP) -> Tensor:
        return model.encode_text(self._tokenizer([""]).to(self._world.device))

    def _everywhere(
        self, clip: nn.Module, action: Callable[[], Result], stand_in: Callable[[CLIP], Tensor]
    ) -> list[Result]:
        """What the action gives in every process; if it fails in one, all raise that."""
        outcome: Result | UserError
        try:
            outcome = action()
        except UserError as exc:
            outcome = exc
        if isinstance(clip, _InStep):
            clip.keep_up(stand_in)
        outcomes = self._world.gather_everywhere(outcome)
        for failure in outcomes:
            if isinstance(failure, UserError):
                raise failure
        return outcomes


class _InStep(nn.Module):
    """A sharded model, whose every call takes all processes, for those that have different numbers of batches."""

    def __init__(self, model: CLIP, world: World) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self._world = world

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        self._world.any(True)
        return self.model.encode_image(images, normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        self._world.any(True)
        return self.model.encode_text(tokens, normalize)

    @torch.no_grad()
    def keep_up(self, encode: Callable[[CLIP], Tensor]) -> None:
        """Takes part in the calls of the processes that have more batches, until none has."""
        while self._world.any(False)[0]:
            encode(self.model)


def feature_options(config: EvalConfig, precision: Precision, workers: int) -> FeatureOptions:
    """How an evaluation computes features in a training of this precision."""
    autocast: Any = _AUTOCAST.get(precision, "fp32")
    return FeatureOptions(config.batch_size, workers, autocast, progress=False)


@dataclass(frozen=True)
class _Pairs:
    """Pictures and captions: the pictures' rows among the features, the captions, and whose each of them is."""

    rows: list[int]
    texts: list[str]
    image_of_text: list[int]


def _recalls(pairs: _Pairs, features: Tensor, texts: Sequence[str], encoded: Tensor) -> Metrics:
    """Recall at 1 and 5 both ways; `encoded` are the features of the distinct `texts`."""
    place = {text: i for i, text in enumerate(texts)}
    text_features = encoded[[place[text] for text in pairs.texts]]
    result = retrieval.evaluate(features[pairs.rows], text_features, torch.tensor(pairs.image_of_text))
    directions = {"image_to_text": result.image_to_text, "text_to_image": result.text_to_image}
    return {f"{name}_r{k}": direction.recall[k] for name, direction in directions.items() for k in (1, 5)}


class _Part(Source):
    """Consecutive samples of a source."""

    def __init__(self, whole: Source, first: int, samples: int | None) -> None:
        count = len(whole) - first if samples is None else samples
        if count < 1 or first + count > len(whole):
            raise UserError(
                f"eval.first={first} and eval.samples={samples} ask for samples that {whole.description} does not "
                f"have: it has {len(whole)}"
            )
        self._whole = whole
        self._first = first
        self.shard_sizes = [count]
        self.description = f"{whole.description}, {count} from number {first} on"
        self.fingerprint = f"{whole.fingerprint}-{first}-{count}"
        self.faults = whole.faults
        self.decoding = whole.decoding

    def __getitem__(self, index: int) -> RawSample:
        return self._whole[self._first + index]

    def name(self, index: int) -> str:
        return self._whole.name(self._first + index)
