"""Zero-shot evaluation while training and at its end: which of all distinct captions belongs to each picture."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from evaclip.data import DataConfig, RawSample, Source, open_configured
from evaclip.errors import UserError
from evaclip.eval.features import FeatureOptions, ImageFeatures, encode_images
from evaclip.eval.zero_shot import build_classifier, evaluate
from evaclip.model.clip import CLIP
from evaclip.train.config import EvalConfig, Precision
from evaclip.train.distributed import World
from evaclip.weights import is_sharded

Metrics = dict[str, float]
Result = TypeVar("Result")

_AUTOCAST = {"amp_bf16": "bf16", "amp_fp16": "fp16"}


class Evaluation:
    """Scores a model on a source whose captions are the class names; every process encodes its part of both.

    Args:
        data: the evaluation set.
        config: which part of it, and the prompts.
        tokenizer: texts to tokens.
        transform: a PIL image to a tensor, without augmentation.
        precision: of the training.
        world: the processes that evaluate together.
    """

    def __init__(
        self,
        data: DataConfig,
        config: EvalConfig,
        tokenizer: Callable[[list[str]], Tensor],
        transform: Callable[[Any], Tensor],
        precision: Precision,
        world: World,
    ) -> None:
        self._source = _Part(open_configured(data), config.first, config.samples)
        self._world = world
        self._templates = config.templates
        self._tokenizer = tokenizer
        self._transform = transform
        self._options = FeatureOptions(
            batch_size=config.batch_size,
            workers=data.workers,
            precision=_AUTOCAST.get(precision, "fp32"),  # type: ignore[arg-type]
            progress=False,
        )

    def __call__(self, model: CLIP) -> Metrics:
        """Top-1 and top-5 accuracy, the accuracy of guessing, and how many pictures and classes that is over."""
        clip = _InStep(model, self._world) if is_sharded(model) else model
        parts = self._everywhere(clip, partial(self._encode, clip), self._blank_image)
        captions = [caption for part in parts if part for caption in part.captions]
        names = sorted(set(captions))
        number = {name: i for i, name in enumerate(names)}
        classifier = torch.cat(self._everywhere(clip, partial(self._classifier, clip, names), self._blank_text))
        features = torch.cat([part.features for part in parts if part])
        result = evaluate(features, torch.tensor([number[caption] for caption in captions]), classifier, names)
        return {
            "zero_shot_top1": result.top1,
            "zero_shot_top5": result.top5,
            "chance_top1": result.chance_top1,
            "samples": result.samples,
            "classes": result.classes,
        }

    def _encode(self, clip: Any) -> ImageFeatures | None:
        mine = self._share(range(len(self._source)))
        if not mine:
            return None
        return encode_images(clip, self._transform, _Part(self._source, mine[0], len(mine)), self._options)

    def _classifier(self, clip: Any, names: list[str]) -> Tensor:
        mine = self._share(names)
        if not mine:
            return torch.empty(0, clip.config.embed_dim)
        return build_classifier(clip, self._tokenizer, mine, self._templates, replace(self._options, workers=0))

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
