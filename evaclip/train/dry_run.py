"""What a run would be: everything is built, a few steps are done, nothing is saved."""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from evaclip.train import host, snapshot, trackers
from evaclip.train.build import Parts, build
from evaclip.train.checkpoint import Start
from evaclip.train.config import ModelConfig, TrainConfig
from evaclip.train.distributed import World, connect, device_of
from evaclip.train.optimizer import set_lr_factor
from evaclip.train.run_folder import RunFolder, locate
from evaclip.train.schedule import lr_factor
from evaclip.train.snapshot import Position

_STEPS = 4
_GIB = 2**30
_PATIENCE = 60.0
"""Seconds after which no further step is timed."""


@dataclass(frozen=True)
class _Timing:
    """What the first steps took, each with the wait for its data; in the first one everything starts."""

    loss: float
    seconds: list[float]

    @property
    def of_a_step(self) -> float:
        return median(self.seconds[1:] or self.seconds)


def dry_run(config: TrainConfig, *, resume: str = "none", overwrite: bool = False) -> None:
    """Prints the plan of a run, what its first steps gave and how long it may take.

    Raises:
        UserError: as the run itself would.
    """
    with connect(config.device, config.parallel) as world:
        _try(config, world, resume, overwrite)


def dry_run_as(config: TrainConfig, gpus: int, *, resume: str = "none", overwrite: bool = False) -> None:
    """The same as one of so many processes, the others of which aren't there: nothing is sent, all else is done.

    On a CPU nothing is computed either, and no data is read: what a GPU would hold is traced.

    Raises:
        UserError: as the run itself would.
    """
    # Imported here because torch's tools take a second, which other runs needn't wait.
    from evaclip.plan.step import plan_step
    from evaclip.train.fake_ranks import fake_ranks

    if device_of(config.device).type == "cpu":
        memory = plan_step(config, gpus, blocks=None).memory
        rows = [(kind, f"{size / _GIB:,.3f} GiB") for kind, size in (*memory.most_common(), ("all", memory.total()))]
        Console().print(_table([("one of", f"{gpus} GPUs, at the highest moment of a step, as traced"), *rows]))
        return
    with closing(fake_ranks(config.device, gpus)) as world:
        _try(config, world, resume, overwrite)


def _try(config: TrainConfig, world: World, resume: str, overwrite: bool) -> None:
    host.prepare(world.device, config.data.workers, config.loss.products)
    trackers.require(config.log)
    remarks: list[str] = []
    start = _start(config, resume, overwrite, remarks.append) if world.is_main else None
    parts = build(config, world)
    position, more = snapshot.begin(world.from_main(start), parts)
    timing = _time(parts, position)
    if world.is_main:
        where = [("run folder", str(RunFolder.of(config).path)), *(("", remark) for remark in (*remarks, *more))]
        Console().print(_table([*where, *_plan(parts), *_measured(parts, position, timing)]))


def _start(config: TrainConfig, resume: str, overwrite: bool, say: Callable[[str], None]) -> Start | None:
    if resume == "none" and not overwrite and RunFolder.of(config).exists:
        say("it exists: the run itself needs --resume auto, --overwrite or another name")
        return None
    return locate(config, resume, overwrite, say)


def _time(parts: Parts, position: Position) -> _Timing:
    timing = _Timing(math.nan, [])
    begin = time.perf_counter()
    parts.resolution.begin(position.step)
    with closing(parts.loader.batches(position.samples)) as batches:
        for step in range(position.step, min(position.step + _STEPS, parts.total_steps)):
            start = time.perf_counter()
            batch = next(batches)
            set_lr_factor(parts.step.optimizer, lr_factor(step, parts.total_steps, parts.config.schedule), step)
            # Reading the loss waits for the device.
            loss = parts.step(batch.images, batch.targets, step).loss.item()
            end = time.perf_counter()
            timing = _Timing(timing.loss if timing.seconds else loss, [*timing.seconds, end - start])
            if parts.world.any(end - begin > _PATIENCE)[0]:
                break
    return timing


def _plan(parts: Parts) -> list[tuple[str, str]]:
    config, world, visual = parts.config, parts.world, parts.task.visual
    sizes = ", ".join(f"{name} {_count(tower)}" for name, tower in parts.task.towers.items())
    kept = visual.num_kept_patches() if visual.patch_dropout else visual.num_patches
    samples = parts.total_steps * config.batch_size
    micro_batch = config.batch_size / world.size / config.accumulation
    return [
        ("model", f"{config.model.name}: {_count(parts.model)} parameters ({sizes})"),
        ("weights from", _weights(config.model)),
        ("data", f"{parts.source.description}: {len(parts.source):,} samples"),
        *(("", remark) for remark in parts.remarks),
        (
            "batch",
            f"{config.batch_size:,} = {world.size} ranks x {config.accumulation} micro-batches x {micro_batch:,.6g}",
        ),
        ("patches kept", f"{kept} of {visual.num_patches}"),
        ("length", f"{parts.total_steps:,} steps, {samples:,} samples, {samples / parts.epoch_samples:.2f} epochs"),
        ("optimizer", f"{config.optim.name}, {len(parts.step.optimizer.param_groups)} parameter groups"),
        ("precision", f"{config.precision} on {world.device}"),
        ("cost", f"{parts.resolution.flops_left(0) / parts.total_steps * config.batch_size / 1e12:,.3g} TFLOP a step"),
    ]


def _measured(parts: Parts, position: Position, timing: _Timing) -> list[tuple[str, str]]:
    left = parts.total_steps - position.step
    if not timing.seconds:
        return [("steps left", "none")]
    count, seconds = len(timing.seconds), timing.of_a_step
    flops = parts.resolution.flops_per_sample(position.step)
    share = flops * parts.config.batch_size / seconds / parts.peak_flops
    # Steps with larger images take longer.
    whole = timedelta(seconds=round(seconds * parts.resolution.flops_left(position.step) / flops))
    rows = [("first step", f"loss {timing.loss:.4f}, {timing.seconds[0]:.2f} s with all that starts")]
    if count > 1:
        steps = "step 2" if count == 2 else f"steps 2 to {count}"
        rows.append(("a step", f"{seconds:.2f} s (median of {steps}, with their data), MFU {share:.1%}"))
        rows.append((f"{left:,} steps", f"about {whole}, an estimate; evaluations and checkpoints come on top"))
    else:
        rows.append((f"{left:,} steps", f"at most about {whole}, an estimate: the first step is the slowest"))
    if parts.world.device.type == "cuda":
        tensors = torch.cuda.max_memory_allocated(parts.world.device)
        free, there = torch.cuda.mem_get_info(parts.world.device)
        rows.append(("GPU memory", f"{tensors / _GIB:.1f} GiB of tensors at the peak"))
        other = (there - free - tensors) / _GIB
        rows.append(
            ("other memory", f"{other:.1f} GiB: context, libraries, fragments; evaclip plan --beside {other:.1f}")
        )
    return rows


def _table(rows: list[tuple[str, str]]) -> Table:
    table = Table(show_header=False, title="Dry run: nothing is saved")
    for row in rows:
        table.add_row(*row)
    return table


def _weights(model: ModelConfig) -> str:
    towers = {"image tower": model.pretrained_image, "text tower": model.pretrained_text}
    parts = [f"{tower}: {source}" for tower, source in towers.items() if source]
    return model.pretrained or "; ".join(parts) or "random start values"


def _count(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:,.1f}M"
