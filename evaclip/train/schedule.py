"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

import math

from evaclip.train.config import ScheduleConfig


def lr_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """Share of the peak learning rate that step `step` (from 0) of `total_steps` uses.

    Linear warm-up, `(step + 1) / warm-up steps`, then constant or a half cosine down to `final_factor`.
    """
    warmup = warmup_steps(total_steps, config)
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total_steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.final_factor + (1 - config.final_factor) * cosine


def warmup_steps(total_steps: int, config: ScheduleConfig) -> int:
    """Steps in which the rate rises."""
    return config.warmup_steps if config.warmup_share is None else round(config.warmup_share * total_steps)


def total_steps(config: ScheduleConfig, batch_size: int, data_samples: int) -> int:
    """Optimizer steps of the run; epochs are rounded up to whole steps."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return math.ceil(config.epochs * (config.epoch_samples or data_samples) / batch_size)
