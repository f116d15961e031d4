"""Zero-shot evaluation while training and at its end: which of all distinct captions belongs to each picture."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from evaclip.data import DataConfig, RawSample, Source, open_configured
from evaclip.errors import UserError
from evaclip.eval.features import FeatureOptions, encode_images
from evaclip.eval.zero_shot import build_classifier, evaluate
from evaclip.train.config import EvalConfig, Precision

Metrics = dict[str, float]

_AUTOCAST = {"amp_bf16": "bf16", "amp_fp16": "fp16"}


class Evaluation:
    """Scores a model on a source whose captions are the class names.

    Args:
        data: the evaluation set.
        config: which part of it, and the prompts.
        tokenizer: texts to tokens.
        transform: a PIL image to a tensor, without augmentation.
        precision: of the training.
    """

    def __init__(
        self,
        data: DataConfig,
        config: EvalConfig,
        tokenizer: Callable[[list[str]], Tensor],
        transform: Callable[[Any], Tensor],
        precision: Precision,
    ) -> None:
        self._source = _Part(open_configured(data), config.first, config.samples)
        self._templates = config.templates
        self._tokenizer = tokenizer
        self._transform = transform
        self._options = FeatureOptions(
            batch_size=config.batch_size,
            workers=data.workers,
            precision=_AUTOCAST.get(precision, "fp32"),  # type: ignore[arg-type]
            progress=False,
        )

    def __call__(self, model: nn.Module) -> Metrics:
        """Top-1 and top-5 accuracy, the accuracy of guessing, and how many pictures and classes that is over."""
        clip: Any = model
        images = encode_images(clip, self._transform, self._source, self._options)
        names = sorted(set(images.captions))
        number = {name: i for i, name in enumerate(names)}
        labels = torch.tensor([number[caption] for caption in images.captions])
        classifier = build_classifier(clip, self._tokenizer, names, self._templates, replace(self._options, workers=0))
        result = evaluate(images.features, labels, classifier, names)
        return {
            "zero_shot_top1": result.top1,
            "zero_shot_top5": result.top5,
            "chance_top1": result.chance_top1,
            "samples": result.samples,
            "classes": result.classes,
        }


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

    def __getitem__(self, index: int) -> RawSample:
        return self._whole[self._first + index]

    def name(self, index: int) -> str:
        return self._whole.name(self._first + index)
