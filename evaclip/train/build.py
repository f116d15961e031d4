"""Everything that a run is made of, built from its configuration."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from typing import Any

from torch import Tensor

from evaclip.data import Source, TrainLoader, open_configured
from evaclip.data.config import DataConfig
from evaclip.data.held_out import hold_out
from evaclip.data.loader import TrainTransform, part_of_batch
from evaclip.data.samples import REDUCTION_MARGIN
from evaclip.errors import UserError
from evaclip.factory import create_model
from evaclip.model.clip import CLIP
from evaclip.model.config import Preprocess
from evaclip.tokenizer import Tokenizer
from evaclip.train import rng
from evaclip.train.compiled import compile_blocks
from evaclip.train.config import ModelConfig, Precision, TrainConfig
from evaclip.train.distributed import World
from evaclip.train.ema import Ema
from evaclip.train.evaluation import Evaluation, open_sets
from evaclip.train.loss import SIGLIP_START, ContrastiveLoss
from evaclip.train.optimizer import build_optimizer, parameter_groups
from evaclip.train.resolution import Resolution
from evaclip.train.schedule import total_steps
from evaclip.train.sharding import WholeRandomNumbers, move_all_but_shards, shard
from evaclip.train.step import StepOptions, TrainStep
from evaclip.train.throughput import peak_flops
from evaclip.transforms import EvalTransform, levels_of


@dataclass(frozen=True)
class Parts:
    """What the loop works with.

    Attributes:
        resolution: which size images have at each step, and what that costs.
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
    resolution: Resolution
    peak_flops: float
    remarks: list[str]


def build(config: TrainConfig, world: World) -> Parts:
    """Builds model, data, optimizer and evaluation.

    Raises:
        UserError: a name or path does not exist, or the numbers do not fit one another.
    """
    rows_of_processes(config, world)
    if not (config.data.train or config.data.mixture):
        raise UserError("data.train is not set: name your data, such as --train-data 'shards/{00000..00099}.tar'")
    whole = open_configured(config.data)
    source, held_out = hold_out(whole, config.held_out or 0.0, config.seed)
    # All processes draw the same start weights, and different random numbers from then on.
    rng.seed_all(config.seed, 0)
    model = build_model(config, world)
    rng.seed_all(config.seed, 1 + world.rank)
    step = build_step(config, world, model)
    tokenizer = Tokenizer(model.config.text.context_length, model.config.text.vocab_size)
    epoch_samples = config.schedule.epoch_samples or len(source)
    steps = total_steps(config.schedule, config.batch_size, len(source))
    loader = _loader(config, world, source, model, tokenizer)
    resolution = Resolution(
        model, loader, config.schedule, steps, partial(_levels, config.data, model.config.preprocess)
    )
    resolution.flops_left(0)  # refuses sizes that the model can't take
    return Parts(
        config=config,
        world=world,
        model=model,
        source=source,
        loader=loader,
        step=step,
        ema=None if config.ema_decay is None else Ema(model, config.ema_decay),
        evaluation=_evaluation(config, world, model, tokenizer, step.loss, held_out),
        total_steps=steps,
        epoch_samples=epoch_samples,
        resolution=resolution,
        peak_flops=world.size * peak_flops(world.device, config.precision),
        remarks=[_held_out_of(config, whole, held_out)] if config.held_out else [],
    )


def build_model(config: TrainConfig, world: World) -> CLIP:
    """The model in training precision, on the device, and sharded if the configuration says so."""
    offloaded = config.parallel.offload != "none"
    sharded = is_cut_up(config, world)
    prepare = partial(shard, config=config.parallel, precision=config.precision, world=world)
    with WholeRandomNumbers() if sharded else nullcontext():
        model: CLIP = create_model(
            config.model.name,
            pretrained=config.model.pretrained,
            pretrained_image=config.model.pretrained_image,
            pretrained_text=config.model.pretrained_text,
            device="cpu" if offloaded else world.device,
            precision=precision_of_parameters(config.precision),
            savings=config.model.savings,
            prepare=prepare if sharded else None,
            **model_options(config),
        )
    if offloaded:
        move_all_but_shards(model, world.device)
    if not sharded:
        world.broadcast_(list(model.parameters()))
    lock(model, config.model)
    if config.compile == "blocks":
        compile_blocks(model)
    if model.logit_bias is not None:
        # In bfloat16 a value near 10 would stay where it is: its neighbours are 0.06 away.
        model.logit_bias.data = model.logit_bias.data.float()
    return model


def build_step(config: TrainConfig, world: World, model: CLIP) -> TrainStep:
    """The step with its loss and its optimizer."""
    rows = rows_of_processes(config, world)
    loss = ContrastiveLoss(config.loss, world.group, [len(part) for part in rows]).to(world.device)
    optimizer = build_optimizer(parameter_groups(model, config.optim), config.optim, config.seed)
    clip, each_chunk = config.optim.grad_clip_norm, config.parallel.accumulate == "shards"
    first = rows[world.rank].start
    options = StepOptions(config.precision, config.accumulation, clip, config.seed, first, each_chunk)
    return TrainStep(model, loss, optimizer, options, world)


def is_cut_up(config: TrainConfig, world: World) -> bool:
    """Whether the processes share out parameters; one process does so for offload's sake alone."""
    return config.parallel.mode != "replicate" and (world.size > 1 or config.parallel.offload != "none")


def lock(model: CLIP, config: ModelConfig) -> None:
    """Takes out of training what the configuration says."""
    if config.lock_image:
        model.lock_image_tower(config.lock_image_unlocked_groups)
    if config.lock_text:
        model.lock_text_tower(config.lock_text_unlocked_layers)


def precision_of_parameters(precision: Precision) -> str:
    """Under autocast it is float32."""
    return precision if precision in ("bf16", "fp16") else "fp32"


def model_options(config: TrainConfig) -> dict[str, Any]:
    """Those of the architecture, with the share of patches that training leaves out and what the loss needs."""
    options = dict(config.model.options)
    if config.model.patch_dropout is not None:
        options["vision"] = {**options.get("vision", {}), "patch_dropout": config.model.patch_dropout}
    if config.loss.name == "siglip":
        options = {**SIGLIP_START, **options}
    return options


def rows_of_processes(config: TrainConfig, world: World) -> list[range]:
    """The rows of a batch that each process has."""
    chunks = world.size * config.accumulation
    if config.batch_size < chunks:
        raise UserError(
            f"batch_size={config.batch_size} is less than one sample for each of {chunks} chunks "
            f"({world.size} processes x accumulation {config.accumulation})"
        )
    return [part_of_batch(config.batch_size, rank, world.size) for rank in range(world.size)]


def _loader(
    config: TrainConfig,
    world: World,
    source: Source,
    model: CLIP,
    tokenizer: Callable[[list[str]], Tensor],
) -> TrainLoader:
    data = config.data
    return TrainLoader(
        source,
        batch_size=config.batch_size,
        transform=_levels(data, model.config.preprocess, model.config.vision.image_size),
        tokenizer=tokenizer,
        seed=config.seed,
        workers=data.workers,
        rank=world.rank,
        world_size=world.size,
        window=data.shuffle_window,
        nodes=data.canonical_nodes,
        machine=world.machine,
        prefetch=data.prefetch,
        pin=world.device.type == "cuda",
        decode_size=REDUCTION_MARGIN * max(model.config.vision.image_shape) if data.jpeg_reduction else None,
    )


def _levels(data: DataConfig, preprocess: Preprocess, size: int | tuple[int, int]) -> TrainTransform:
    """What the workers do; the device does the rest."""
    return levels_of(training_transform(data, size, preprocess), preprocess)


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
    loss: ContrastiveLoss,
    held_out: Source | None,
) -> Evaluation | None:
    sets = open_sets(config, held_out)
    transform = EvalTransform(model.config.vision.image_size, model.config.preprocess)
    return Evaluation(sets, tokenizer, transform, loss, world) if sets else None


def _held_out_of(config: TrainConfig, whole: Source, held_out: Source | None) -> str:
    share = f"held_out={config.held_out:g} of {len(whole):,} samples"
    if held_out is None:
        return f"{share} is none: nothing is held out"
    return f"{share}: {len(held_out):,} are never trained on"
