"""What a run would be: everything is built, one step is done, nothing is saved."""

import time
from contextlib import closing
from datetime import timedelta

import torch
from rich.console import Console
from rich.table import Table

from evaclip.train.build import Parts, build
from evaclip.train.config import ModelConfig, TrainConfig
from evaclip.train.distributed import connect
from evaclip.train.optimizer import set_lr_factor
from evaclip.train.schedule import lr_factor


def dry_run(config: TrainConfig) -> None:
    """Prints the plan of a run and what its first step gave."""
    with closing(connect(config.device, offload=config.parallel.offload != "none")) as world:
        parts = build(config, world)
        seconds, loss = _first_step(parts)
        if world.is_main:
            Console().print(_table([*_plan(parts), *_measured(parts, seconds, loss)]))


def _first_step(parts: Parts) -> tuple[float, float]:
    with closing(parts.loader.batches()) as batches:
        batch = next(batches)
    set_lr_factor(parts.step.optimizer, lr_factor(0, parts.total_steps, parts.config.schedule))
    start = time.perf_counter()
    result = parts.step(batch.images, batch.tokens, 0)
    # Reading the loss waits for the device.
    loss = result.loss.item()
    return time.perf_counter() - start, loss


def _plan(parts: Parts) -> list[tuple[str, str]]:
    config, world, model = parts.config, parts.world, parts.model
    towers = {"visual": model.visual, "text": model.text}
    sizes = ", ".join(f"{name} {_count(tower)}" for name, tower in towers.items())
    kept = model.visual.num_kept_patches() if model.visual.patch_dropout else model.visual.num_patches
    samples = parts.total_steps * config.batch_size
    chunk = config.batch_size // world.size // config.accumulation
    return [
        ("model", f"{config.model.name}: {_count(model)} parameters ({sizes})"),
        ("weights from", _weights(config.model)),
        ("data", f"{parts.source.description}: {len(parts.source):,} samples"),
        *(("held out", remark) for remark in parts.remarks),
        (
            "batch",
            f"{config.batch_size:,} = {world.size} processes x {config.accumulation} chunks x {chunk:,}",
        ),
        ("patches kept", f"{kept} of {model.visual.num_patches}"),
        (
            "length",
            f"{parts.total_steps:,} steps, {samples:,} samples, {samples / parts.epoch_samples:.2f} epochs",
        ),
        ("optimizer", f"{config.optim.name}, {len(parts.step.optimizer.param_groups)} parameter groups"),
        ("precision", f"{config.precision} on {world.device}"),
        ("cost", f"{parts.flops_per_sample * config.batch_size / 1e12:,.3g} TFLOP a step"),
    ]


def _measured(parts: Parts, seconds: float, loss: float) -> list[tuple[str, str]]:
    share = parts.flops_per_sample * parts.config.batch_size / seconds / parts.peak_flops
    whole = timedelta(seconds=round(seconds * parts.total_steps))
    rows = [
        ("first step", f"loss {loss:.4f}, {seconds:.2f} s, MFU {share:.1%} (the first step is the slowest)"),
        ("all steps", f"at most about {whole} at this speed"),
    ]
    if parts.world.device.type == "cuda":
        gib = torch.cuda.max_memory_allocated(parts.world.device) / 2**30
        rows.append(("GPU memory", f"{gib:.1f} GiB at the peak"))
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
