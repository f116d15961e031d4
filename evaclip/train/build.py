"""Everything that a run is made of, built from its configuration."""

from contextlib import nullcontext
from dataclasses import dataclass
from shlex import quote

from torch import nn

from evaclip.data import Source, TrainLoader, open_configured
from evaclip.data.config import DataConfig
from evaclip.data.loader import part_of_batch
from evaclip.data.mixture import MixtureSource
from evaclip.data.samples import REDUCTION_MARGIN
from evaclip.data.shard_list import LIST_SUFFIX
from evaclip.data.validation import hold_out
from evaclip.data.webdataset import WebDatasetSource
from evaclip.errors import UserError
from evaclip.train import rng
from evaclip.train.compiled import compile_blocks
from evaclip.train.config import Precision, TrainConfig
from evaclip.train.distributed import World
from evaclip.train.ema import Ema
from evaclip.train.optimizer import build_optimizer, parameter_groups
from evaclip.train.resolution import Resolution
from evaclip.train.schedule import total_steps
from evaclip.train.sharding import WholeRandomNumbers, move_all_but_shards, shard
from evaclip.train.step import StepOptions, TrainStep
from evaclip.train.tasks import task_class
from evaclip.train.tasks.task import Evaluate, Task
from evaclip.train.throughput import peak_flops

MANY_SHARDS = 1000
"""From more shards on, that all processes look at each of them is worth a line."""


@dataclass(frozen=True)
class Parts:
    """What the loop works with.

    Attributes:
        resolution: which size images have at each step, and what that costs.
        peak_flops: FLOP/s of all devices together.
        epoch_samples: samples that count as one epoch.
        remarks: lines on the data and the task to print before the run begins.
    """

    config: TrainConfig
    world: World
    task: Task
    source: Source
    loader: TrainLoader
    step: TrainStep
    ema: Ema | None
    evaluation: Evaluate | None
    total_steps: int
    epoch_samples: int
    resolution: Resolution
    peak_flops: float
    remarks: list[str]

    @property
    def model(self) -> nn.Module:
        """That of the task."""
        return self.task.model


def build(config: TrainConfig, world: World) -> Parts:
    """Builds model, data, optimizer and evaluation.

    Raises:
        UserError: a name or path does not exist, or the numbers do not fit one another.
    """
    check_batch(config, world)
    if not (config.data.train or config.data.mixture):
        raise UserError("data.train is not set: name your data, such as --train-data 'shards/{00000..00099}.tar'")
    kind = task_class(config.task.name)
    whole = open_configured(kind.data(config), captions=kind.captions)
    source, held_out = hold_out(whole, config.held_out or 0.0, config.seed)
    # All processes draw the same start weights, and different random numbers from then on.
    rng.seed_all(config.seed, 0)
    task = build_task(config, world)
    rng.seed_all(config.seed, 1 + world.rank)
    step = build_step(config, world, task)
    steps = total_steps(config.schedule, config.batch_size, len(source))
    loader = _loader(config, world, source, task)
    resolution = Resolution(task, loader, config.data, config.schedule, steps)
    resolution.flops_left(0)  # refuses sizes that the model can't take
    return Parts(
        config=config,
        world=world,
        task=task,
        source=source,
        loader=loader,
        step=step,
        ema=None if config.ema_decay is None else Ema(task.model, config.ema_decay),
        evaluation=task.evaluation(config, world, held_out),
        total_steps=steps,
        epoch_samples=config.schedule.epoch_samples or len(source),
        resolution=resolution,
        peak_flops=world.size * peak_flops(world.device, config.precision),
        remarks=[
            *([_held_out_of(config, whole, held_out)] if config.held_out else []),
            *unlisted(config.data, whole, world.size),
            *task.remarks(),
        ],
    )


def build_task(config: TrainConfig, world: World) -> Task:
    """The task, its model in training precision, on the device, and sharded if the configuration says so."""
    kind = task_class(config.task.name)
    offloaded = config.parallel.offload != "none"
    sharded = is_cut_up(config, world)

    def prepare(model: nn.Module) -> None:
        shard(kind.towers_of(model).values(), config.parallel, config.precision, world)

    with WholeRandomNumbers() if sharded else nullcontext():
        model = kind.create_model(
            config,
            device="cpu" if offloaded else world.device,
            precision=precision_of_parameters(config.precision),
            prepare=prepare if sharded else None,
        )
    if offloaded:
        move_all_but_shards(model, world.device)
    if not sharded:
        world.broadcast_(list(model.parameters()))
    if config.compile == "blocks":
        compile_blocks(model)
    return kind.build(config, world, model)


def build_step(config: TrainConfig, world: World, task: Task) -> TrainStep:
    """The step with its optimizer."""
    optimizer = build_optimizer(parameter_groups(task.model, task.towers, config.optim), config.optim, config.seed)
    together = task.rows_per_group(config)
    options = StepOptions(
        precision=config.precision,
        accumulation=config.accumulation,
        grad_clip_norm=config.optim.grad_clip_norm,
        seed=config.seed,
        first_row=part_of_batch(config.batch_size, world.rank, world.size, together).start,
        batch_size=config.batch_size,
        together=together,
        reduce_each_micro_batch=config.parallel.accumulate == "shards",
    )
    return TrainStep(task, optimizer, options, world)


def is_cut_up(config: TrainConfig, world: World) -> bool:
    """Whether the processes share out parameters; one process does so for offload's sake alone."""
    return config.parallel.mode != "replicate" and (world.size > 1 or config.parallel.offload != "none")


def precision_of_parameters(precision: Precision) -> str:
    """Under autocast it is float32."""
    return precision if precision in ("bf16", "fp16") else "fp32"


def check_batch(config: TrainConfig, world: World) -> None:
    """Raise UserError if a micro-batch of a rank has no sample, or a batch cuts rows that belong together."""
    parts, together = world.size * config.accumulation, task_class(config.task.name).rows_per_group(config)
    if config.batch_size % together:
        raise UserError(f"batch_size={config.batch_size} is no multiple of {together}, the samples that are mixed")
    if config.batch_size < parts * together:
        least = "one sample" if together == 1 else f"{together} samples"
        raise UserError(
            f"batch_size={config.batch_size} is less than {least} for each of {parts} micro-batches "
            f"({world.size} ranks x accumulation {config.accumulation})"
        )


def _loader(config: TrainConfig, world: World, source: Source, task: Task) -> TrainLoader:
    data, images = config.data, task.visual.config
    return TrainLoader(
        source,
        batch_size=config.batch_size,
        transform=task.transform(data, images.image_size),
        targets=task.targets(images.image_size),
        seed=config.seed,
        workers=data.workers,
        rank=world.rank,
        world_size=world.size,
        window=data.shuffle_window,
        nodes=data.canonical_nodes,
        machine=world.machine,
        prefetch=data.prefetch,
        pin=world.device.type == "cuda",
        decode_size=REDUCTION_MARGIN * max(images.image_shape) if data.jpeg_reduction else None,
        together=task.rows_per_group(config),
    )


def unlisted(data: DataConfig, whole: Source, processes: int) -> list[str]:
    """A line on each set of many local shards that has no list, where there are several processes."""
    sets = [part.train for part in data.mixture.values()] if data.mixture else [data.train]
    sources = whole.parts if isinstance(whole, MixtureSource) else [whole]
    return [
        f"each of {processes} processes has looked at all {len(source.shard_sizes):,} shards of {path}; one look for "
        f"all, and data.train=shards.json that opens at once: evaclip data index {quote(path)} --out shards.json"
        for path, source in zip(sets, sources, strict=True)
        if processes > 1
        and isinstance(source, WebDatasetSource)
        and not (source.remote or path.endswith(LIST_SUFFIX))
        and len(source.shard_sizes) > MANY_SHARDS
    ]


def _held_out_of(config: TrainConfig, whole: Source, held_out: Source | None) -> str:
    share = f"held_out={config.held_out:g} of {len(whole):,} samples"
    if held_out is None:
        return f"{share} is none: nothing is held out"
    return f"{share}: {len(held_out):,} are never trained on"
