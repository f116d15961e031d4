"""Dry run: build everything, time a few steps, save nothing."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from datetime import timedelta
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from evaclip.train import snapshot
from evaclip.train.build import Run, build
from evaclip.train.checkpoint import Start
from evaclip.train.config import ModelConfig, TrainConfig
from evaclip.train.distributed import World, connect, device_of, fake_ranks
from evaclip.train.optimizer import set_lr_factor
from evaclip.train.progress import require_trackers
from evaclip.train.run_folder import RunFolder, locate
from evaclip.train.schedule import lr_factor
from evaclip.train.snapshot import Position

_STEPS = 4
_GIB = 2**30
_PATIENCE = 60.0
"""Seconds after which no further step is timed."""


def dry_run(config: TrainConfig, *, resume: str = "none", overwrite: bool = False, gpus: int | None = None) -> None:
    """Prints the plan of a run, the speed of its first steps and an estimate of its duration.

    Args:
        resume, overwrite: as for the run itself.
        gpus: act as one of this number of ranks, without the others: collectives return at once. On a CPU the memory of
            a step on a GPU is traced instead: nothing is computed, and no data is read.

    Raises:
        UserError: as the run itself would.
    """
    if gpus is not None and device_of(config.device).type == "cpu":
        # Imported here because torch's tools take a second, which other runs needn't wait.
        from evaclip.plan.step import plan_step

        memory = plan_step(config, gpus, blocks=None).memory
        rows = [(kind, f"{size / _GIB:,.3f} GiB") for kind, size in (*memory.most_common(), ("all", memory.total()))]
        Console().print(_table([("one of", f"{gpus} GPUs, at the highest moment of a step, as traced"), *rows]))
        return
    ranks: AbstractContextManager[World] = (
        connect(config.device, config.parallel) if gpus is None else closing(fake_ranks(config.device, gpus))
    )
    with ranks as world:
        require_trackers(config.log)
        remarks: list[str] = []
        start = _start(config, resume, overwrite, remarks.append) if world.is_main else None
        run = build(config, world)
        position, more = snapshot.begin(world.from_main(start), run)
        loss, seconds = _time(run, position)
        if world.is_main:
            where = [("run folder", str(RunFolder.of(config).path)), *(("", remark) for remark in (*remarks, *more))]
            Console().print(_table([*where, *_plan(run), *_measured(run, position, loss, seconds)]))


def _start(config: TrainConfig, resume: str, overwrite: bool, say: Callable[[str], None]) -> Start | None:
    if resume == "none" and not overwrite and RunFolder.of(config).exists:
        say("it exists: the run itself needs --resume auto, --overwrite or another name")
        return None
    return locate(config, resume, overwrite, say)


def _time(run: Run, position: Position) -> tuple[float, list[float]]:
    """Loss of the first step, and seconds of the first steps with the wait for their data."""
    losses, seconds = list[float](), list[float]()
    begin = time.perf_counter()
    run.set_image_size(position.step)
    with closing(run.loader.batches(position.samples)) as batches:
        for step in range(position.step, min(position.step + _STEPS, run.total_steps)):
            start = time.perf_counter()
            batch = next(batches)
            set_lr_factor(run.step.optimizer, lr_factor(step, run.total_steps, run.config.schedule), step)
            # Reading the loss waits for the device.
            losses.append(run.step(batch, step).loss.item())
            seconds.append(time.perf_counter() - start)
            if run.world.any(time.perf_counter() - begin > _PATIENCE)[0]:
                break
    return (losses or [math.nan])[0], seconds


def _plan(run: Run) -> list[tuple[str, str]]:
    config, world, visual = run.config, run.world, run.task.visual
    sizes = ", ".join(f"{name} {_count(tower)}" for name, tower in run.task.towers.items())
    samples = run.total_steps * config.batch_size
    steps = config.accumulation_steps
    micro_batch = config.batch_size / world.size / steps
    patches = f"{visual.num_kept_patches()} of {visual.num_patches}"
    if config.data.resize:
        patches = f"{1 - visual.patch_dropout:.0%} of {config.data.max_patches or visual.num_patches} at most"
    return [
        ("model", f"{config.model.name}: {_count(run.model)} parameters ({sizes})"),
        ("weights from", _weights(config.model)),
        ("data", f"{run.source.description}: {len(run.source):,} samples"),
        *(("", remark) for remark in run.remarks),
        ("batch", f"{config.batch_size:,} = {world.size} ranks x {steps} micro-batches x {micro_batch:,.6g}"),
        ("patches kept", patches),
        ("length", f"{run.total_steps:,} steps, {samples:,} samples, {samples / run.epoch_samples:.2f} epochs"),
        ("optimizer", f"{config.optim.name}, {len(run.step.optimizer.param_groups)} parameter groups"),
        ("precision", f"{config.precision} on {world.device}"),
        ("cost", f"{run.flops_left(0) / run.total_steps * config.batch_size / 1e12:,.3g} TFLOP a step"),
    ]


def _measured(run: Run, position: Position, loss: float, seconds: list[float]) -> list[tuple[str, str]]:
    left = run.total_steps - position.step
    if not seconds:
        return [("steps left", "none")]
    count, step_seconds = len(seconds), median(seconds[1:] or seconds)
    flops = run.flops_per_sample(position.step)
    rate = run.config.batch_size / step_seconds
    mfu = run.mfu(rate, position.step)
    # Steps with larger images take longer.
    whole = timedelta(seconds=round(step_seconds * run.flops_left(position.step) / flops))
    rows = [("first step", f"loss {loss:.4f}, {seconds[0]:.2f} s with all that starts")]
    if count > 1:
        steps = "step 2" if count == 2 else f"steps 2 to {count}"
        text = f"{step_seconds:.2f} s (median of {steps}, with their data), {rate:,.1f} samples/s"
        rows.append(("a step", text if mfu is None else f"{text}, MFU {mfu:.1%}"))
        rows.append((f"{left:,} steps", f"about {whole}, an estimate; evaluations and checkpoints come on top"))
    else:
        rows.append((f"{left:,} steps", f"at most about {whole}, an estimate: the first step is the slowest"))
    if run.world.device.type == "cuda":
        tensors = torch.cuda.max_memory_allocated(run.world.device)
        free, total = torch.cuda.mem_get_info(run.world.device)
        other = (total - free - tensors) / _GIB
        rows.append(("GPU memory", f"{tensors / _GIB:.1f} GiB of tensors at the peak"))
        rows.append(
            (
                "other memory",
                f"{other:.1f} GiB: context, libraries, fragments; evaclip plan --non-tensor-gib {other:.1f}",
            )
        )
    return rows


def _table(rows: list[tuple[str, str]]) -> Table:
    table = Table(show_header=False, title="Dry run: nothing is saved")
    for row in rows:
        table.add_row(*row)
    return table


def _weights(model: ModelConfig) -> str:
    towers = {"image tower": model.pretrained_image, "text tower": model.pretrained_text}
    sources = [f"{tower}: {source}" for tower, source in towers.items() if source]
    return model.pretrained or "; ".join(sources) or "random start values"


def _count(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:,.1f}M"
