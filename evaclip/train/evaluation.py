"""Evaluation during training on any number of sets and ranks, by the functions of `evaclip.eval`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, takewhile
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from evaclip.data import Source, open_configured
from evaclip.data.image_folder import FolderSource
from evaclip.data.validation import Selection
from evaclip.data.workers import WorkerDied
from evaclip.errors import UserError
from evaclip.eval import retrieval, zero_shot
from evaclip.eval.classify import assign_labels
from evaclip.eval.features import (
    FeatureOptions,
    ImageFeatures,
    NothingReadable,
    encode_images,
    encode_texts,
    refuse_rest,
)
from evaclip.eval.ranking import hit_rate, target_ranks
from evaclip.eval.retrieval import Picture, distinct_pictures, merge
from evaclip.eval.zero_shot import IMAGENET, PLACEHOLDER, load_classnames, load_templates
from evaclip.train.config import EvalSetConfig, Metric, TrainConfig
from evaclip.train.distributed import World
from evaclip.train.loss import ContrastiveLoss
from evaclip.weights import is_sharded

Result = TypeVar("Result")
_HARMLESS = (OSError, MemoryError, WorkerDied)
"""Errors after which a rank can go on, unlike those of a device or a lost rank."""
Metrics = dict[str, float]
Attempt = Callable[[Sequence[str], Callable[[], Metrics]], Metrics]
"""(names of metrics, function that measures them) -> metrics; NaN for each if the function fails."""

VALIDATION_SET = "held_out"
"""Name of the validation split among the sets."""
_DIRECTIONS = ("image_to_text", "text_to_image")
_CUTOFFS = (1, 5)
_HEADLINES: dict[Metric, tuple[str, ...]] = {
    "classify": ("zero_shot_top1", "zero_shot_top5"),
    "retrieval": tuple(f"{direction}_r{k}" for direction in _DIRECTIONS for k in _CUTOFFS),
    "loss": ("loss",),
}
_AUTOCAST: dict[str, Any] = {"amp_bf16": "bf16", "amp_fp16": "fp16"}
_PLAIN = (PLACEHOLDER,)
_BLOCK = 256
"""Queries that a rank takes at a time: few, so that many ranks get some."""


class Stopped(Exception):
    """A rank was asked to stop; all ranks raise this before the same batch."""


class DistributedEncoder(nn.Module):
    """A model that encodes images and captions, of which each rank has a share.

    Ranks vote before each batch on whether to stop. Sharded parameters need all ranks in every call, so ranks without
    batches encode blank ones until no rank has any left.

    Args:
        model: in evaluation mode; a CLIP, or an image model with `encode_image` and `config`.
        world: the ranks.
        tokenizer: captions to tokens.
        stop: whether this rank was asked to stop.
    """

    def __init__(
        self, model: Any, world: World, tokenizer: Callable[[list[str]], Tensor] | None, stop: Callable[[], bool]
    ) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self._image_shape = getattr(model.config, "vision", model.config).image_shape
        self.tokenizer: Any = tokenizer
        self.stop = stop
        self.device = world.device
        self._world = world
        self._is_sharded = is_sharded(model)
        self.train(model.training)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        self._is_any_busy(True)
        features: Tensor = self.model.encode_image(images, normalize)
        return features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        self._is_any_busy(True)
        features: Tensor = self.model.encode_text(tokens, normalize)
        return features

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This rank's share of the items."""
        rank, size = self._world.rank, self._world.size
        return items[len(items) * rank // size : len(items) * (rank + 1) // size]

    def everywhere(self, action: Callable[[], Result], *, texts: bool = False) -> list[Result]:
        """The results of the action on all ranks.

        Raises:
            UserError: on all ranks, of the first rank that failed; also for unreadable files, a lack of host memory,
                and a data worker that died.
            Stopped: on all ranks.
        """
        outcome: Result | UserError
        try:
            outcome = action()
        except UserError as exc:
            outcome = exc
        except _HARMLESS as exc:
            outcome = UserError(str(exc) if isinstance(exc, WorkerDied) else f"{type(exc).__name__}: {exc}")
        self._encode_blanks(texts)
        outcomes = self._world.gather_everywhere(outcome)
        for failure in outcomes:
            if isinstance(failure, UserError):
                raise failure
        return outcomes

    def over(self, items: Sequence[Any], action: Callable[[Any], Result]) -> list[Result]:
        """The results of an action that encodes nothing, one per item; each rank runs it on its share.

        Raises as `everywhere`.
        """
        mine = takewhile(lambda _: not self.stop(), self.share(items))
        return list(chain(*self.everywhere(lambda: [action(item) for item in mine])))

    @torch.no_grad()
    def _encode_blanks(self, texts: bool) -> None:
        while self._is_any_busy(False):
            if self._is_sharded and texts and self.tokenizer:
                self.model.encode_text(self.tokenizer([""]).to(self.device))
            elif self._is_sharded:
                self.model.encode_image(torch.zeros(1, 3, *self._image_shape, device=self.device))

    def _is_any_busy(self, is_busy: bool) -> bool:
        """Whether any rank has a batch."""
        is_busy, stop = self._world.any(is_busy, self.stop())
        if stop:
            raise Stopped
        return is_busy


@dataclass
class EvalSet:
    """A set that is open, with its prompts.

    Attributes:
        options: how features are computed.
        max_bad_fraction: share of the samples that may be unreadable.
        pictures: the distinct ones, once they have been looked for.
    """

    name: str
    config: EvalSetConfig
    source: Source
    classnames: tuple[str, ...] | None
    templates: tuple[str, ...]
    options: FeatureOptions
    max_bad_fraction: float
    pictures: list[Picture] | None = None


def open_sets(config: TrainConfig, validation: Source | None) -> list[EvalSet]:
    """Opens the evaluation sets of a run.

    Args:
        validation: the validation split, which is a set too.

    Raises:
        UserError: a set or one of its files doesn't exist, or its class folders don't match its class names.
    """
    sets = dict(config.eval.sets or {})
    if validation is not None:
        sets.setdefault(VALIDATION_SET, EvalSetConfig())
    return [_open(name, each, config, validation) for name, each in sets.items() if each is not None]


def _open(name: str, config: EvalSetConfig, run: TrainConfig, validation: Source | None) -> EvalSet:
    data = config.data
    if data is None and validation is None:
        raise UserError(
            f"eval.sets.{name}.data is not set and nothing is held out: name its data, as eval.sets.{name}.data.train="
            "PATH, or set validation_split"
        )
    task = run.task.name
    for key, user in (("fit", "masked_image"), ("templates", "contrastive")):
        if getattr(config, key) is not None and task != user:
            raise UserError(f"eval.sets.{name}.{key} is not used with task.name={task}, but with {user}: leave it out")
    # The names of class folders go into templates, and into a caption's template no less.
    whole = validation if data is None else open_configured(replace(data, caption_template=PLACEHOLDER))
    assert whole is not None
    source = _select(whole, config, f"eval.sets.{name}")
    templates = config.templates
    if templates is None:
        templates = IMAGENET if config.classes == IMAGENET else PLACEHOLDER
        if templates == PLACEHOLDER and data is not None and source.classes:
            templates = data.caption_template
    prompts = (templates,) if isinstance(templates, str) else templates
    classnames = load_classnames(config.classes) if isinstance(config.classes, str) else config.classes
    if classnames is not None and task == "contrastive":
        try:
            assign_labels((), (), classnames, source.classes)
        except UserError as exc:
            raise UserError(f"eval.sets.{name}.classes: {exc}") from None
    return EvalSet(
        name,
        config,
        source,
        classnames,
        tuple(template for each in prompts for template in load_templates(each)),
        FeatureOptions(
            run.eval.batch_size, (data or run.data).workers, _AUTOCAST.get(run.precision, "fp32"), progress=False
        ),
        1.0 if config.allow_unreadable else (data or run.data).max_bad_fraction,
    )


def measured(model: nn.Module, sets: Mapping[str, Callable[[Attempt], Metrics]]) -> tuple[Metrics, list[str]]:
    """The metrics of all sets as `NAME/METRIC`, and a line for each failed measurement; its metrics are NaN.

    Args:
        model: is in evaluation mode meanwhile.
        sets: functions that measure a set, by name.

    Raises:
        Stopped: a rank was asked to stop.
    """
    was_training = model.training
    model.eval()
    metrics: Metrics = {}
    problems: list[str] = []
    try:
        for name, measure in sets.items():
            results = measure(partial(_attempt, name, problems))
            metrics |= {f"{name}/{key}": value for key, value in results.items()}
    finally:
        model.train(was_training)
    return metrics, problems


def _attempt(name: str, problems: list[str], metrics: Sequence[str], action: Callable[[], Metrics]) -> Metrics:
    try:
        return action()
    except UserError as exc:
        problems.append(f"not evaluated on {name}: {exc}")
        return dict.fromkeys(metrics, math.nan)


def evaluate_pairs(
    clip: DistributedEncoder,
    transform: Callable[[Any], Any],
    loss: ContrastiveLoss,
    each: EvalSet,
    attempt: Attempt,
) -> Metrics:
    """Zero-shot accuracy, retrieval and loss of a CLIP on a set; every rank encodes its share."""
    headlines = [name for metric in each.config.metrics or ("classify",) for name in _HEADLINES[metric]]
    return attempt(headlines, lambda: _Measurement(each, clip, transform, loss).metrics())


class _Measurement:
    """One set as one model sees it; whatever several metrics need is encoded once."""

    def __init__(
        self, each: EvalSet, clip: DistributedEncoder, transform: Callable[[Any], Any], loss: ContrastiveLoss
    ) -> None:
        self._set = each
        self._clip = clip
        self._loss = loss
        self._texts: dict[str, Tensor] = {}
        source = each.source
        features = encode_everywhere(clip, transform, source, each)
        self._captions = features.captions
        self._numbers = [int(key) for key in features.keys]
        self._unreadable = len(source) - len(features)
        self._features = features.features

    def metrics(self) -> Metrics:
        metrics: Metrics = {"samples": len(self._captions), "unreadable": self._unreadable}
        kinds = self._kinds()
        if "classify" in kinds:
            metrics |= self._classify()
        if "retrieval" in kinds:
            metrics |= self._retrieve()
        if "loss" in kinds:
            images, texts = (each.to(self._clip.device) for each in (self._features, self._encoded(self._captions)))
            scale, bias = self._clip.model.logit_scale.float().exp(), self._clip.model.logit_bias
            metrics["loss"] = self._loss(images, texts, scale, None if bias is None else bias.float()).item()
        return metrics

    def _kinds(self) -> tuple[Metric, ...]:
        each = self._set
        if each.config.metrics is not None:
            return each.config.metrics
        if each.classnames is not None or each.source.classes:
            return ("classify",)
        # Names of classes belong to several pictures each, and to find one picture's own means nothing.
        texts = [text for picture in self._pictures() for text in picture.captions]
        return ("classify",) if 2 * len(set(texts)) < len(texts) else ("classify", "retrieval", "loss")

    def _classify(self) -> Metrics:
        each = self._set
        names = [each.source.name(number) for number in self._numbers]
        labels = assign_labels(self._captions, names, each.classnames, each.source.classes)
        classifier = self._classifier(labels.classnames)
        ranks = target_ranks(self._features, classifier, labels.indices, block=_BLOCK, over=self._clip.over)
        return {
            "zero_shot_top1": hit_rate(ranks, 1),
            "zero_shot_top5": hit_rate(ranks, 5),
            "chance_top1": 1 / len(classifier),
            "classes": len(classifier),
        }

    def _retrieve(self) -> Metrics:
        pictures = self._pictures()
        row = {number: i for i, number in enumerate(self._numbers)}
        texts = self._encoded([text for picture in pictures for text in picture.captions])
        image_of_text = torch.tensor([image for image, picture in enumerate(pictures) for _ in picture.captions])
        images = self._features[[row[each.index] for each in pictures]]
        result = retrieval.evaluate(images, texts, image_of_text, block=_BLOCK, over=self._clip.over)
        return {f"{name}_r{k}": getattr(result, name).recall[k] for name in _DIRECTIONS for k in _CUTOFFS}

    def _pictures(self) -> list[Picture]:
        """The distinct pictures among the samples that were encoded."""
        each, clip = self._set, self._clip
        if each.pictures is None:
            mine = takewhile(lambda _: not clip.stop(), clip.share(range(len(each.source))))
            everywhere: dict[bytes, Picture] = {}
            for pictures in clip.everywhere(partial(distinct_pictures, each.source, mine)):
                merge(everywhere, pictures)
            each.pictures = list(everywhere.values())
        numbers = set(self._numbers)
        return [picture for picture in each.pictures if picture.index in numbers]

    def _classifier(self, classnames: Sequence[str]) -> Tensor:
        """[classes, embed_dim], each the mean over the templates."""
        if self._set.templates == _PLAIN:
            return self._encoded(classnames)
        encode = partial(self._encode_texts, classnames, self._set.templates)
        return torch.cat(self._clip.everywhere(encode, texts=True))

    def _encoded(self, texts: Sequence[str]) -> Tensor:
        """Normalised features [texts, embed_dim]."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if missing:
            rows = torch.cat(self._clip.everywhere(partial(self._encode_texts, missing), texts=True))
            self._texts |= zip(missing, rows, strict=True)
        return torch.stack([self._texts[text] for text in texts])

    def _encode_texts(self, texts: Sequence[str], templates: Sequence[str] = _PLAIN) -> Tensor:
        """This rank's share of the texts, or of classes of these names."""
        clip, mine = self._clip, self._clip.share(texts)
        if not mine:
            return torch.empty(0, clip.config.embed_dim)
        if templates == _PLAIN:
            return encode_texts(clip, clip.tokenizer, mine, self._set.options)
        return zero_shot.build_classifier(clip, clip.tokenizer, mine, templates, self._set.options)


def encode_everywhere(
    model: DistributedEncoder, transform: Callable[[Any], Any], source: Source, each: EvalSet
) -> ImageFeatures:
    """Features of all images of a source, of which each rank encodes its share; keys are the samples' indices.

    Raises:
        UserError: more images than the set's configuration allows can't be read, or all.
    """
    shares = model.everywhere(partial(_encode_share, model, transform, source, each.options))
    features = [share for share in shares if share]
    captions = [caption for share in features for caption in share.captions]
    remedy = f"eval.sets.{each.name}.allow_unreadable=true"
    refuse_rest(source, len(source) - len(captions), each.max_bad_fraction, remedy)
    if not features:
        raise NothingReadable(f"none of the {len(source):,} samples of {source.description} could be read")
    return ImageFeatures(
        torch.cat([share.features for share in features]), captions, [key for share in features for key in share.keys]
    )


def _encode_share(
    model: DistributedEncoder, transform: Callable[[Any], Any], source: Source, options: FeatureOptions
) -> ImageFeatures | None:
    mine = model.share(range(len(source)))
    if not mine:
        return None
    try:
        return encode_images(model, transform, Selection(source, mine), options)
    except NothingReadable:
        return None


def _select(whole: Source, config: EvalSetConfig, key: str) -> Source:
    """Consecutive samples of a source."""
    skip, samples = config.skip, config.samples
    count = len(whole) - skip if samples is None else samples
    if count < 1 or skip + count > len(whole):
        raise UserError(
            f"{key}.skip={skip} and {key}.samples={samples} ask for samples that {whole.description} does not "
            f"have: it has {len(whole)}"
        )
    selection = Selection(whole, range(skip, skip + count))
    selection.description = f"{whole.description}, {count} from number {skip} on"
    # Those of drawn pictures are their captions, which differ as captions do.
    selection.classes = whole.classes if isinstance(whole, FolderSource) else ()
    return selection
