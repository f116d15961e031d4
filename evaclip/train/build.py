"""Everything that a run is made of, built from its configuration."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from evaclip.data import Source, TrainLoader, open_configured
from evaclip.data.config import DataConfig
from evaclip.data.held_out import hold_out
from evaclip.data.loader import TrainTransform
from evaclip.data.samples import REDUCTION_MARGIN
from evaclip.errors import UserError
from evaclip.factory import create_model
from evaclip.model.clip import CLIP
from evaclip.model.config import Preprocess
from evaclip.model.flops import flops_per_sample
from evaclip.tokenizer import Tokenizer
from evaclip.train import rng
from evaclip.train.compiled import compile_blocks
from evaclip.train.config import ModelConfig, TrainConfig
from evaclip.train.distributed import World
from evaclip.train.ema import Ema
from evaclip.train.evaluation import Evaluation, feature_options
from evaclip.train.loss import SIGLIP_INITIAL_SCALE, ContrastiveLoss
from evaclip.train.optimizer import build_optimizer, parameter_groups
from evaclip.train.schedule import total_steps
from evaclip.train.sharding import WholeRandomNumbers, move_all_but_shards, shard
from evaclip.train.step import StepOptions, TrainStep
from evaclip.train.throughput import BACKWARD_FACTOR, peak_flops
from evaclip.transforms import EvalTransform, levels_of


@dataclass(frozen=True)
class Parts:
    """What the loop works with.

    Attributes:
        flops_per_sample: model FLOPs of a training step per sample, forward and backward.
        peak_flops: FLOP/s of all devices together.
        epoch_samples: samples that count as one epoch.
        remarks: what is to be said about the data before the run begins.
    """

    config: TrainConfig
    world: World
    model: CLIP
    source: Source
    loader: TrainLoader
    step: TrainStep
    ema: Ema | None
    evaluation: Evaluation | None
    total_steps: int
    epoch_samples: int
    flops_per_sample: float
    peak_flops: float
    remarks: list[str]


def build(config: TrainConfig, world: World) -> Parts:
    """Builds model, data, optimizer and evaluation.

    Raises:
        UserError: a name or path does not exist, or the numbers do not fit one another.
    """
    per_process = _per_process(config, world)
    if not (config.data.train or config.data.mixture):
        raise UserError("data.train is not set: name your data, such as --train-data 'shards/{00000..00099}.tar'")
    whole = open_configured(config.data)
    source, held_out = hold_out(whole, config.held_out or 0.0, config.seed)
    # All processes draw the same start weights, and different random numbers from then on.
    rng.seed_all(config.seed, 0)
    model = build_model(config, world)
    rng.seed_all(config.seed, 1 + world.rank)
    loss = ContrastiveLoss(config.loss, world.group).to(world.device)
    optimizer = build_optimizer(parameter_groups(model, loss, config.optim), config.optim, config.seed)
    options = StepOptions(config.precision, config.accumulation, config.optim.grad_clip_norm, config.seed)
    tokenizer = Tokenizer(model.config.text.context_length, model.config.text.vocab_size)
    epoch_samples = config.schedule.epoch_samples or len(source)
    return Parts(
        config=config,
        world=world,
        model=model,
        source=source,
        loader=_loader(config, world, source, model, tokenizer, per_process),
        step=TrainStep(model, loss, optimizer, options, world),
        ema=None if config.ema_decay is None else Ema(model, config.ema_decay),
        evaluation=_evaluation(config, world, model, tokenizer, held_out),
        total_steps=total_steps(config.schedule, config.batch_size, len(source)),
        epoch_samples=epoch_samples,
        flops_per_sample=BACKWARD_FACTOR * flops_per_sample(model.config, 1 - model.visual.patch_dropout),
        peak_flops=world.size * peak_flops(world.device, config.precision),
        remarks=[_held_out_of(config, whole, held_out)] if config.held_out else [],
    )


def build_model(config: TrainConfig, world: World) -> CLIP:
    """The model in training precision, on the device, and sharded if the configuration says so."""
    precision = config.precision if config.precision in ("bf16", "fp16") else "fp32"
    offloaded = config.parallel.offload != "none"
    sharded = config.parallel.mode != "replicate" and (world.size > 1 or offloaded)
    prepare = partial(shard, config=config.parallel, precision=config.precision, world=world)
    with WholeRandomNumbers() if sharded else nullcontext():
        model: CLIP = create_model(
            config.model.name,
            pretrained=config.model.pretrained,
            pretrained_image=config.model.pretrained_image,
            pretrained_text=config.model.pretrained_text,
            device="cpu" if offloaded else world.device,
            precision=precision,
            savings=config.model.savings,
            prepare=prepare if sharded else None,
            **_model_options(config.model),
        )
    if offloaded:
        move_all_but_shards(model, world.device)
    if not sharded:
        world.broadcast_(list(model.parameters()))
    if config.model.lock_image:
        model.lock_image_tower(config.model.lock_image_unlocked_groups)
    if config.model.lock_text:
        model.lock_text_tower(config.model.lock_text_unlocked_layers)
    if config.compile == "blocks":
        compile_blocks(model)
    if config.loss.name == "siglip" and config.model.pretrained is None:
        torch.nn.init.constant_(model.logit_scale, SIGLIP_INITIAL_SCALE)
    return model


def _model_options(config: ModelConfig) -> dict[str, Any]:
    options = dict(config.options)
    if config.patch_dropout is not None:
        options["vision"] = {**options.get("vision", {}), "patch_dropout": config.patch_dropout}
    return options


def _per_process(config: TrainConfig, world: World) -> int:
    parts = world.size * config.accumulation
    if config.batch_size % parts:
        raise UserError(
            f"batch_size={config.batch_size} is no multiple of {parts} "
            f"({world.size} processes x accumulation {config.accumulation})"
        )
    return config.batch_size // world.size


def _loader(
    config: TrainConfig,
    world: World,
    source: Source,
    model: CLIP,
    tokenizer: Callable[[list[str]], Tensor],
    per_process: int,
) -> TrainLoader:
    data = config.data
    transform = training_transform(data, model.config.vision.image_size, model.config.preprocess)
    return TrainLoader(
        source,
        batch_size=per_process,
        transform=levels_of(transform, model.config.preprocess),
        tokenizer=tokenizer,
        seed=config.seed,
        workers=data.workers,
        rank=world.rank,
        world_size=world.size,
        window=data.shuffle_window,
        nodes=data.canonical_nodes,
        prefetch=data.prefetch,
        pin=world.device.type == "cuda",
        decode_size=REDUCTION_MARGIN * max(model.config.vision.image_shape) if data.jpeg_reduction else None,
    )


def training_transform(data: DataConfig, size: int | tuple[int, int], preprocess: Preprocess) -> TrainTransform:
    """The transform that `data.transform` names.

    Raises:
        UserError: there is nothing of this name that can be called.
    """
    try:
        named = resolve_name(data.transform)
    except (ImportError, AttributeError, ValueError) as exc:
        expected = "expected MODULE:NAME, the module installed or in a folder of PYTHONPATH"
        raise UserError(f"data.transform={data.transform!r} isn't there: {exc}; {expected}") from exc
    if not callable(named):
        raise UserError(f"data.transform={data.transform!r} is a {type(named).__name__}; expected MODULE:CLASS")
    transform: TrainTransform = named(size, preprocess, data.augmentation)
    return transform


def _evaluation(
    config: TrainConfig,
    world: World,
    model: CLIP,
    tokenizer: Callable[[list[str]], Tensor],
    held_out: Source | None,
) -> Evaluation | None:
    source = open_configured(config.eval.data) if config.eval.data else held_out
    if source is None:
        return None
    transform = EvalTransform(model.config.vision.image_size, model.config.preprocess)
    options = feature_options(config.eval, config.precision, (config.eval.data or config.data).workers)
    return Evaluation(source, config.eval, tokenizer, transform, options, world)


def _held_out_of(config: TrainConfig, whole: Source, held_out: Source | None) -> str:
    share = f"held_out={config.held_out:g} of {len(whole):,} samples"
    if held_out is None:
        return f"{share} is none: nothing is held out"
    use = "evaluated" if config.eval.data is None else "not used, as eval.data names another set to evaluate"
    return f"{share}: {len(held_out):,} are never trained on; they are {use}"
