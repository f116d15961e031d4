"""Contrastive training of a CLIP: exact gradients of one loss over the global batch, in any number of micro-batches."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from evaclip.data import Source
from evaclip.data.config import DataConfig
from evaclip.data.loader import Batch, Targets, TrainTransform, rank_rows, tokenized
from evaclip.errors import UserError
from evaclip.factory import create_model, tokenizer_of
from evaclip.model.clip import CLIP
from evaclip.model.flops import flops_per_sample
from evaclip.model.hf_text import HFTextTower, HFTokenizer
from evaclip.model.text import TextTower
from evaclip.runs.files import HF_TEXT_FOLDER, MODEL_CONFIG_FILE, PREPROCESS_FILE
from evaclip.tokenizer import Tokenizer
from evaclip.train import rng
from evaclip.train.config import SIXTEEN_BITS, TrainConfig
from evaclip.train.distributed import World
from evaclip.train.evaluation import DistributedEncoder, Metrics, evaluate_pairs, measured, open_sets
from evaclip.train.loss import SIGLIP_START, ContrastiveLoss
from evaclip.train.micro_batch import MicroBatch, StepContext, send
from evaclip.train.tasks.task import Evaluate, Size, Task, training_transform
from evaclip.train.throughput import BACKWARD_FACTOR
from evaclip.transforms import NativeSize, PackedTransform, image_transform, levels_of
from evaclip.weights import describe_preprocess
from evakernels import Packing

MAX_LOG_SCALE = math.log(100.0)


@dataclass(frozen=True)
class _Pairs:
    """A micro-batch of pairs, with its tokens on the device and their packing."""

    micro_batch: MicroBatch
    tokens: Tensor
    packing: Packing


class Contrastive(Task):
    """Contrastive training of images and captions.

    With several micro-batches the loss still sees every pair: features of all micro-batches are computed without a
    graph, one loss gives the gradients of the features and of logit_scale, then each micro-batch is computed again and
    its features' gradients are passed backward (Gao et al. 2021, arXiv 2101.06983). Both passes use the same kept
    patches and random states, so gradients equal those of the whole batch.

    Args:
        model: its targets are int64 tokens [b, context_length].
        loss: over the global batch.
    """

    model: CLIP
    mean_caption_tokens = 15
    """Mean length of a caption that `stand_ins` assumes, with start and end token."""

    def __init__(self, model: CLIP, loss: ContrastiveLoss) -> None:
        super().__init__(model, self.towers_of(model), model.config.preprocess)
        self.loss = loss

    @cached_property
    def _tokenizer(self) -> Tokenizer | HFTokenizer:
        # Plans run without it, as it may be on the hub.
        return tokenizer_of(self.model.config.text)

    @classmethod
    def create_model(cls, config: TrainConfig, **how: Any) -> CLIP:
        model = config.model
        options = dict(model.options)
        if model.patch_dropout is not None:
            options["vision"] = {**options.get("vision", {}), "patch_dropout": model.patch_dropout}
        if config.loss.name == "siglip":
            options = {**SIGLIP_START, **options}
        if (options.get("text") or {}).get("hf_model_name"):
            if config.parallel.mode != "replicate":
                raise UserError(
                    f"parallel.mode must be replicate for a text tower of transformers, got {config.parallel.mode}"
                )
            if config.precision in SIXTEEN_BITS:
                raise UserError(
                    "precision must be fp32, amp_bf16 or amp_fp16 for a text tower of transformers, got "
                    f"{config.precision}: --set precision=amp_bf16"
                )
        return create_model(
            model.name,
            pretrained=model.pretrained,
            pretrained_image=model.pretrained_image,
            pretrained_text=model.pretrained_text,
            savings=model.savings,
            as_trained=False,
            **how,
            **options,
        )

    @staticmethod
    def towers_of(model: CLIP) -> dict[str, nn.Module]:
        return {"visual": model.visual, "text": model.text}

    @classmethod
    def build(cls, config: TrainConfig, world: World, model: CLIP) -> Self:
        if config.model.lock_image:
            model.lock_image_tower(config.model.lock_image_unlocked_groups)
            if not any(parameter.requires_grad for parameter in model.visual.parameters()):
                model.visual.patch_dropout = 0.0
        if config.model.lock_text:
            model.lock_text_tower(config.model.lock_text_unlocked_layers)
        native = model.config.preprocess.max_patches
        if native and config.data.resize is None:
            raise UserError(
                f"data.resize must be native for a model with preprocess.max_patches={native}, got None; "
                "model.options.preprocess.max_patches=null trains it on squares"
            )
        most = model.config.vision.num_patches if config.data.resize else None
        # Checkpoints hold the limit, so that evaluations after the run pack images too.
        preprocess = replace(model.config.preprocess, max_patches=config.data.max_patches or most)
        model.config = replace(model.config, preprocess=preprocess)
        counts = [len(rank_rows(config.batch_size, rank, world.size)) for rank in range(world.size)]
        return cls(model, ContrastiveLoss(config.loss, world.group, counts))

    def transform(self, data: DataConfig, size: Size) -> TrainTransform:
        """Under `data.resize=native` packed images, without the patches that patch dropout drops."""
        if data.resize is None:
            return super().transform(data, size)
        vision = replace(self.model.config.vision, image_size=size)
        native = NativeSize(vision.patch_size, data.max_patches or vision.num_patches)
        levels = levels_of(training_transform(data, native, self.preprocess), self.preprocess)
        return PackedTransform(levels, native.patch_size, self.visual.patch_dropout)

    def targets(self, size: Size) -> Targets:
        return tokenized(self._tokenizer)

    def backward(self, context: StepContext) -> dict[str, Tensor]:
        pairs = [self._pairs(each, context.device) for each in context.micro_batches]
        backward = self._backward if len(pairs) == 1 else self._backward_in_micro_batches
        loss, *features = backward(pairs, context)
        return {"loss": loss, "accuracy": self.loss.accuracy(*features)} if context.measure else {"loss": loss}

    def remarks(self) -> list[str]:
        if self.visual.patch_dropout == self.model.config.vision.patch_dropout:
            return []
        return ["model.lock_image=true: the image tower keeps all patches, as it isn't trained"]

    def after_update(self) -> None:
        self.model.logit_scale.clamp_(0.0, MAX_LOG_SCALE)

    def measures(self) -> dict[str, Tensor]:
        return {"logit_scale": self.model.logit_scale.detach().double().exp()}

    def evaluation(self, config: TrainConfig, world: World, validation: Source | None) -> Evaluate | None:
        sets = open_sets(config, validation)
        for each in sets:
            if probes := [metric for metric in each.config.metrics or () if metric in ("linear_probe", "knn")]:
                raise UserError(
                    f"eval.sets.{each.name}.metrics must be classify, retrieval or loss with task.name=contrastive, "
                    f"got {', '.join(probes)}; `evaclip eval` has probes of a CLIP"
                )
        transform = image_transform(self.model.config.vision, self.preprocess)
        loss = ContrastiveLoss(replace(self.loss.config, label_smoothing=0.0))

        def measure(model: CLIP, stop: Callable[[], bool]) -> tuple[Metrics, list[str]]:
            clip = DistributedEncoder(model, world, self._tokenizer, stop)
            return measured(model, {each.name: partial(evaluate_pairs, clip, transform, loss, each) for each in sets})

        return measure if sets else None

    def flops_per_sample(self, size: Size) -> float:
        config, most = self.model.config, self.preprocess.max_patches
        if most is not None and size == config.vision.image_size:
            # One row of patches: the cost depends on their number alone.
            size = config.vision.patch_size, most * config.vision.patch_size
        config = replace(config, vision=replace(config.vision, image_size=size))
        return BACKWARD_FACTOR * flops_per_sample(config, 1 - self.visual.patch_dropout)

    def tokens_computed(self, batch: Batch) -> int:
        """The prefix tokens and kept patches of each image; tokens of each caption, or with `pack_text=False` the
        whole context.
        """
        targets, lengths = batch.targets, batch.lengths
        packed = self.model.text.savings.pack_text
        text = int(self.model.text.end_positions(targets).sum()) + len(targets) if packed else targets.numel()
        kept = len(targets) * self.visual.num_kept_patches() if lengths is None else int(lengths.sum())
        return len(targets) * self.visual.config.prefix_tokens + kept + text

    def stand_ins(self, rows: int, sizes: set[int], fake: Callable[[Any], Any]) -> Tensor:
        text, config = self.model.text, self.model.config.text
        assert isinstance(text, TextTower)  # others have no plan
        lengths = _caption_lengths(rows, self.mean_caption_tokens, config.context_length)
        tokens = torch.zeros(rows, config.context_length, dtype=torch.int64)
        tokens[torch.arange(rows), torch.tensor(lengths) - 1] = config.vocab_size - 1
        # Which rows a caption has can't be read from tokens without data.
        packings = fake({size: type(text).pack_tokens(text, tokens[:size]) for size in sizes})
        text.pack_tokens = lambda tokens: packings[len(tokens)]  # type: ignore[method-assign]
        traced: Tensor = fake(tokens)
        return traced

    def descriptions(self, config: TrainConfig) -> dict[str, Any]:
        return {
            PREPROCESS_FILE: describe_preprocess(self.model.config),
            MODEL_CONFIG_FILE: {"name": config.model.name, **self.model.config.to_dict()},
        }

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer of a text tower of transformers, which may change or move during a run."""
        tokenizer, files = tokenizer_of(self.model.config.text), dict[str, bytes]()
        if isinstance(tokenizer, HFTokenizer):
            files |= tokenizer.files()
        if isinstance(self.model.text, HFTextTower):
            files["config.json"] = self.model.text.transformer.config.to_json_string().encode()
        return {f"{HF_TEXT_FOLDER}/{name}": content for name, content in files.items()}

    def _pairs(self, micro_batch: MicroBatch, device: torch.device) -> _Pairs:
        packing = self.model.text.pack_tokens(micro_batch.targets)
        packing = tree_map_only(Tensor, partial(send, device=device), packing)
        return _Pairs(micro_batch, send(micro_batch.targets, device), packing)

    def _backward(self, pairs: list[_Pairs], context: StepContext) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and the features of images and captions."""
        image_features, text_features = self._features(pairs[0], next(context.images()), context)
        loss = self._loss(image_features, text_features)
        context.begin(pairs[0].micro_batch)
        context.scaled(loss).backward()
        return loss, image_features.detach(), text_features.detach()

    def _backward_in_micro_batches(self, pairs: list[_Pairs], context: StepContext) -> tuple[Tensor, Tensor, Tensor]:
        # A locked tower draws no random numbers, and one pass is enough for its features.
        trained = [any(p.requires_grad for p in tower.parameters()) for tower in (self.model.visual, self.model.text)]
        states, features, images = [], [], context.images(rounds=1 + trained[0])
        for each in pairs:
            states.append(rng.capture(context.device))
            with torch.no_grad():
                features.append(self._features(each, next(images), context))
        whole = [torch.cat(each) for each in zip(*features, strict=True)]
        image_features, text_features = (x.requires_grad_(needs) for x, needs in zip(whole, trained, strict=True))
        loss = self._loss(image_features, text_features)
        context.scaled(loss).backward()
        for each, state in zip(pairs, states, strict=True):
            context.begin(each.micro_batch)
            rng.restore(state, context.device)
            outputs: list[Tensor] = []
            if all(trained):
                outputs += self._features(each, next(images), context)
            elif trained[0]:
                with context.autocast():
                    index = each.micro_batch.token_index
                    outputs.append(self.model.encode_image(next(images), normalize=True, token_index=index))
            elif trained[1]:
                with context.autocast():
                    outputs.append(self.model.encode_text(each.tokens, normalize=True, packing=each.packing))
            if outputs:
                gradients = [value.grad[each.micro_batch.rows] for value in whole if value.grad is not None]
                torch.autograd.backward(outputs, gradients)
        return loss, image_features.detach(), text_features.detach()

    def _features(self, pairs: _Pairs, images: Any, context: StepContext) -> tuple[Tensor, Tensor]:
        with context.autocast():
            index = pairs.micro_batch.token_index
            features = self.model(images, pairs.tokens, token_index=index, packing=pairs.packing)
        return features[0], features[1]

    def _loss(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        scale, bias = self.model.logit_scale, self.model.logit_bias
        loss: Tensor = self.loss(
            _at_least_fp32(image_features),
            _at_least_fp32(text_features),
            _at_least_fp32(scale).exp(),
            None if bias is None else _at_least_fp32(bias),
        )
        return loss


def _caption_lengths(count: int, mean: int, longest: int) -> list[int]:
    """Lengths of `count` captions with this mean; one has the maximum length, as in any large batch."""
    if count == 1:
        return [mean]
    rest, extra = divmod(max(count * mean - longest, 2 * (count - 1)), count - 1)
    return [longest, *(min(rest + (index < extra), longest) for index in range(count - 1))]


def _at_least_fp32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
