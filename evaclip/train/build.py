"""A training run: model, data, optimizer and evaluation, built from a configuration."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from shlex import quote

import torch
from torch import nn

from evaclip.data import Source, TrainLoader, open_configured
from evaclip.data.loader import rank_rows
from evaclip.data.mixture import MixtureSource
from evaclip.data.samples import REDUCTION_MARGIN
from evaclip.data.shard_list import LIST_SUFFIX
from evaclip.data.validation import hold_out
from evaclip.data.webdataset import WebDatasetSource
from evaclip.errors import UserError
from evaclip.machine import multiplies_bfloat16, usable_cores
from evaclip.model.tower import ResidualBlock
from evaclip.train import rng
from evaclip.train.config import SIXTEEN_BITS, Precision, TrainConfig
from evaclip.train.distributed import World
from evaclip.train.ema import Ema
from evaclip.train.optimizer import build_optimizer, parameter_groups
from evaclip.train.schedule import image_size_at, image_size_phases, total_steps
from evaclip.train.sharding import WholeRandomNumbers, move_all_but_shards, shard
from evaclip.train.step import StepOptions, TrainStep
from evaclip.train.tasks import task_class
from evaclip.train.tasks.task import Evaluate, Size, Task
from evaclip.train.throughput import peak_flops
from evakernels import keep_freed_memory

_MANY_SHARDS = 1000
"""Number of shards above which a run of several ranks suggests a shard list."""
_MOST_GRAPHS = 64


@dataclass(frozen=True)
class Run:
    """Model, data, optimizer and evaluation of a run.

    Attributes:
        epoch_samples: samples of one epoch.
        remarks: lines to print before the run begins.
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
    remarks: list[str]

    @property
    def model(self) -> nn.Module:
        return self.task.model

    def image_size(self, step: int) -> Size:
        """The image size of a step, counted from 0."""
        size = image_size_at(step, self.total_steps, self.config.schedule)
        return size or self.task.visual.config.image_size

    def set_image_size(self, step: int) -> None:
        """Makes the model and the loader's next iterator use the image size of this step."""
        size = self.image_size(step)
        self.task.visual.set_image_size(size)
        self.loader.set_transform(self.task.transform(self.config.data, size), self.task.targets(size))

    @contextmanager
    def final_image_size(self) -> Iterator[None]:
        """Inside, the model takes images of its final size."""
        visual = self.task.visual
        size = visual.present.image_size
        visual.set_image_size(visual.config.image_size)
        try:
            yield
        finally:
            visual.set_image_size(size)

    def flops_per_sample(self, step: int) -> float:
        """Model FLOPs of a training step per sample, forward and backward."""
        return self.task.flops_per_sample(self.image_size(step))

    def mfu(self, samples_per_second: float, step: int) -> float | None:
        """Model FLOP/s of all ranks over their devices' peak; None if the peak is unknown."""
        peak = peak_flops(self.world.device, self.config.precision)
        return peak and samples_per_second * self.flops_per_sample(step) / (self.world.size * peak)

    def flops_left(self, step: int) -> float:
        """Sum of `flops_per_sample` over the steps from `step` to the end."""
        phases = image_size_phases(self.total_steps, self.config.schedule)
        left = [range(max(step, steps.start), steps.stop) for steps, _ in phases]
        return sum(len(steps) * self.flops_per_sample(steps.start) for steps in left if steps)


def build(config: TrainConfig, world: World) -> Run:
    """Builds model, data, optimizer and evaluation.

    Raises:
        UserError: a name or path does not exist, or the numbers do not fit one another.
    """
    prepare_device(config, world.device)
    check_batch(config, world)
    if not (config.data.train or config.data.mixture):
        raise UserError("data.train is not set: name your data, such as --train-data 'shards/{00000..00099}.tar'")
    kind = task_class(config.task.name)
    whole = open_configured(kind.data(config), captions=kind.captions)
    source, validation = hold_out(whole, config.validation_split or 0.0, config.seed)
    # All ranks draw the same initial weights, and different random numbers from then on.
    rng.seed_all(config.seed, 0)
    task = build_task(config, world)
    rng.seed_all(config.seed, 1 + world.rank)
    run = Run(
        config=config,
        world=world,
        task=task,
        source=source,
        step=build_step(config, world, task),
        loader=_loader(config, world, source, task),
        ema=None if config.ema_decay is None else Ema(task.model, config.ema_decay),
        evaluation=task.evaluation(config, world, validation),
        total_steps=total_steps(config.schedule, config.batch_size, len(source)),
        epoch_samples=config.schedule.epoch_samples or len(source),
        remarks=[
            *_precision_remarks(world.device, config.precision),
            *_data_remarks(config, whole, validation, world.size),
            *task.remarks(),
        ],
    )
    run.flops_left(0)  # raises for image sizes that the model can't take
    return run


def prepare_device(config: TrainConfig, device: torch.device) -> None:
    """Sets the precision of float32 matmuls; on a CPU keeps freed memory, and leaves cores to the data workers."""
    # By torch's defaults cuDNN rounds to TF32 in the patch embedding, unlike all other matmuls of a float32 model.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    if device.type == "cpu":
        keep_freed_memory()
        # A data worker that shares a core with one of torch's threads delays all of them.
        torch.set_num_threads(max(1, min(torch.get_num_threads(), usable_cores() - config.data.workers)))


def build_task(config: TrainConfig, world: World) -> Task:
    """The task, its model in training precision, on the device, and sharded if the configuration says so."""
    kind = task_class(config.task.name)
    offloaded = config.parallel.offload != "none"
    sharded = shards_parameters(config, world)

    def prepare(model: nn.Module) -> None:
        shard(kind.towers_of(model).values(), config.parallel, config.precision, world)

    with WholeRandomNumbers() if sharded else nullcontext():
        model = kind.create_model(
            config,
            device="cpu" if offloaded else world.device,
            prepare=prepare if sharded else None,
        )
    cast_matrices(model, config.precision)
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
        accumulation_steps=config.accumulation_steps,
        grad_clip_norm=config.optim.grad_clip_norm,
        seed=config.seed,
        first_row=rank_rows(config.batch_size, world.rank, world.size, together).start,
        batch_size=config.batch_size,
        together=together,
        reduce_each_micro_batch=config.parallel.accumulate == "shards",
    )
    return TrainStep(task, optimizer, options, world)


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Makes torch.compile compile every block of the towers when it first runs.

    Equal blocks share one graph; blocks with stochastic depth have one each. Numbers of samples and tokens are dynamic.
    Parameters keep their names, and sharding, recomputation and packing work around the blocks as before.
    """
    # All blocks count as one function to the compiler, which gives up at 8 graphs of it.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            module.compile(fullgraph=True, dynamic=True, backend=backend)


def shards_parameters(config: TrainConfig, world: World) -> bool:
    """Whether ranks shard the parameters; a single rank does so only to offload them."""
    return config.parallel.mode != "replicate" and (world.size > 1 or config.parallel.offload != "none")


def cast_matrices(model: nn.Module, precision: Precision) -> None:
    """Under bf16 and fp16 casts all parameters but those of one dimension or none, such as norms and logit_scale.

    Near 1 a learning rate is less than half the distance of two 16-bit numbers, so an update would be lost.
    """
    if precision in SIXTEEN_BITS:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        model._apply(lambda value: value.to(dtype) if value.is_floating_point() and value.ndim > 1 else value)


def check_batch(config: TrainConfig, world: World) -> None:
    """Raise UserError if a micro-batch of a rank has no sample, or a batch cuts rows that belong together."""
    micro_batches = world.size * config.accumulation_steps
    together = task_class(config.task.name).rows_per_group(config)
    if config.batch_size % together:
        raise UserError(f"batch_size={config.batch_size} is not a multiple of {together}, the samples that are mixed")
    if config.batch_size < micro_batches * together:
        least = "one sample" if together == 1 else f"{together} samples"
        raise UserError(
            f"batch_size={config.batch_size} is less than {least} for each of {micro_batches} micro-batches "
            f"({world.size} ranks x accumulation_steps {config.accumulation_steps})"
        )


def _loader(config: TrainConfig, world: World, source: Source, task: Task) -> TrainLoader:
    data, images = config.data, task.visual.config
    side = max(images.image_shape)
    if data.max_patches is not None:
        side = math.ceil(images.patch_size * math.sqrt(data.max_patches))
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
        decode_size=REDUCTION_MARGIN * side if data.jpeg_reduction else None,
        together=task.rows_per_group(config),
    )


def _precision_remarks(device: torch.device, precision: Precision) -> list[str]:
    if precision == "fp16":
        return ["precision=fp16 scales no loss, so small gradients become 0; precision=amp_fp16 scales it"]
    if device.type != "cpu" or precision not in ("amp_bf16", "bf16") or multiplies_bfloat16():
        return []
    return [f"precision={precision} is slow here: this processor multiplies no bfloat16; precision=fp32 is faster"]


def _data_remarks(config: TrainConfig, whole: Source, validation: Source | None, ranks: int) -> list[str]:
    """Lines on the validation split, on many local shards without a list, and on a shuffle window of few batches."""
    data, remarks = config.data, []
    if config.validation_split:
        held_out = "nothing is held out" if validation is None else f"{len(validation):,} are never trained on"
        remarks.append(f"validation_split={config.validation_split:g} of {len(whole):,} samples: {held_out}")
    sets = [item.train for item in data.mixture.values()] if data.mixture else [data.train]
    sources = whole.sources if isinstance(whole, MixtureSource) else [whole]
    remarks += [
        f"each of {ranks} ranks has opened all {len(source.shard_sizes):,} shards of {path}; "
        f"`evaclip data index {quote(path)} --out shards.json` and data.train=shards.json open at once"
        for path, source in zip(sets, sources, strict=True)
        if ranks > 1
        and isinstance(source, WebDatasetSource)
        and not (source.remote or path.endswith(LIST_SUFFIX))
        and len(source.shard_sizes) > _MANY_SHARDS
    ]
    window, nodes = data.shuffle_window, data.canonical_nodes
    mixed, least = window * nodes, 4 * config.batch_size
    if 0 < mixed < min(least, len(whole)):
        remarks.append(
            f"data.shuffle_window={window} x data.canonical_nodes={nodes} shuffles {mixed:,} samples with each other, "
            f"fewer than 4 batches of {config.batch_size:,}; data.shuffle_window={math.ceil(least / nodes)} mixes 4"
        )
    return remarks
