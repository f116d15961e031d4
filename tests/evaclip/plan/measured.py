"""Memory that a real training step allocates on this CPU, as torch's own allocator reports it."""

import gc
from contextlib import closing, nullcontext
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from evaclip.plan.recorder import local
from evaclip.train.build import build_step, build_task, is_cut_up
from evaclip.train.config import TrainConfig
from evaclip.train.distributed import World
from evaclip.train.fake_ranks import fake_ranks


def peak_of_step(config: TrainConfig, gpus: int) -> int:
    """Peak bytes of the second step of rank 0 of `gpus`, of everything that the run has allocated."""
    world = nullcontext(World(torch.device("cpu"))) if gpus == 1 else closing(fake_ranks("cpu", gpus))
    with world as ranks:
        task = build_task(config, ranks)
        step = build_step(config, ranks, task)
        rows = config.batch_size // gpus
        micro = -(-rows // config.accumulation)
        targets = task.stand_ins(rows, {micro, rows // config.accumulation}, lambda tensors: tensors)
        images = torch.randn(rows, 3, *task.visual.config.image_shape)
        step(images, targets, 0)
        step.optimizer.zero_grad()
        # Images and targets are in host memory, except those of a micro-batch.
        known = [*task.model.parameters(), *task.model.buffers(), *task.extra_tensors()]
        known += [images[:micro].clone(), targets[:micro].clone()]
        known += [value for state in step.optimizer.state.values() for value in state.values()]
        held = sum(local(value).untyped_storage().nbytes() for value in known)
        assert is_cut_up(config, ranks) == (gpus > 1)
        return held + peak_of(lambda: step(images, targets, 1))


def peak_of(run: Any) -> int:
    """Peak bytes that `run()` allocates on top of those before it.

    Without the workspace of convolutions, which a GPU doesn't have: with AMX instructions it is 104 MB for 16 images.
    """
    # Memory of an earlier call that is freed in this one would count as negative.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    total = peak = convolution_ends = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() in ("aten::convolution", "aten::convolution_backward"):
            convolution_ends = event.end_ns()
        if event.name() == "[memory]":
            total += event.nbytes()
            if event.start_ns() >= convolution_ends:
                peak = max(peak, total)
    return peak
