"""The learning rate and the image size as pure functions of the step, so that resuming needs no scheduler state."""

import math

from evaclip.train.config import ScheduleConfig


def lr_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """Learning rate of step `step` (from 0) of `total_steps`, as a fraction of the peak rate.

    Linear warm-up, `(step + 1) / warm-up steps`, then down to `final_factor`: by half a cosine, or constant until the
    cooldown (Hägele et al. 2024, arXiv 2405.18392), which begins when the warm-up has ended.
    """
    warmup = _length(config.warmup_steps, config.warmup_fraction, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    cooldown = _length(config.cooldown_steps, config.cooldown_fraction, total_steps)
    start = warmup if config.name == "cosine" else max(warmup, total_steps - cooldown)
    progress = min(1.0, max(0, step - start) / max(1, total_steps - start))
    if config.name == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        left = 1 - (progress if config.cooldown == "linear" else math.sqrt(progress))
    return config.final_factor + (1 - config.final_factor) * left


def _length(steps: int, fraction: float | None, total_steps: int) -> int:
    return steps if fraction is None else round(fraction * total_steps)


def image_size_phases(total_steps: int, config: ScheduleConfig) -> list[tuple[range, int | None]]:
    """Phases with one image size each: steps (from 0) and side of the images, None for the model's image size."""
    phases: list[tuple[range, int | None]] = []
    begin, end = 0, 0.0
    for phase in config.resolutions:
        end += total_steps * phase.fraction if phase.fraction is not None else phase.steps or 0
        phases.append((range(begin, min(round(end), total_steps)), phase.image_size))
        begin = phases[-1][0].stop
    return [(steps, size) for steps, size in [*phases, (range(begin, total_steps), None)] if steps]


def image_size_at(step: int, total_steps: int, config: ScheduleConfig) -> int | None:
    """Side of the images of step `step` (from 0), or None for the model's own size."""
    return next((size for steps, size in image_size_phases(total_steps, config) if step in steps), None)


def total_steps(config: ScheduleConfig, batch_size: int, data_samples: int) -> int:
    """Optimizer steps of the run; epochs are rounded up to whole steps."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return math.ceil(config.epochs * (config.epoch_samples or data_samples) / batch_size)
