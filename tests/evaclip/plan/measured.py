"""What a real training step on this CPU allocates, as torch's own allocator reports it."""

import gc
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from evaclip import CLIP, create_model
from evaclip.plan.job import Job
from evaclip.plan.recorder import local
from evaclip.plan.tasks import caption_lengths, caption_tokens
from evaclip.train.as_gpus import pretended
from evaclip.train.build import build_step, build_task
from evaclip.train.config import OptimConfig
from evaclip.train.distributed import World
from evaclip.train.sharding import shard
from evaclip.train.tasks.task import Task
from evakernels import clip_loss


def batch_of(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and tokens of one GPU, with captions as the plan assumes them."""
    vision, text = job.config.vision, job.config.text
    lengths = caption_lengths(job.chunk, job.caption_tokens, text.context_length) * job.accumulation
    return torch.randn(job.local_batch, 3, *vision.image_shape), caption_tokens(lengths, text)


def peak_of_step(job: Job) -> int:
    """Bytes at the highest moment of the trainer's second step of `job`, of all that the run has allocated.

    In this process, which is one of `job.gpus` where parameters are cut up, the others of which aren't there.
    """
    alone = nullcontext(World(torch.device("cpu")))
    with alone if job.mode == "replicate" else closing(pretended("cpu", job.gpus)) as world:
        config = replace(job.run, optim=OptimConfig(name=job.optimizer))
        task = build_task(config, world)
        step = build_step(config, world, task)
        images, targets = rows_of(job, task)
        step(images, targets, 0)
        step.optimizer.zero_grad()
        # Images and targets lie in host memory, but for those of a chunk.
        known = [*task.model.parameters(), *task.model.buffers(), *task.beside()]
        known += [images[: job.chunk].clone(), targets[: job.chunk].clone()]
        known += [value for state in step.optimizer.state.values() for value in state.values()]
        held = sum(local(value).untyped_storage().nbytes() for value in known)
        return held + highest(lambda: step(images, targets, 1))


def rows_of(job: Job, task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and targets of one GPU, for any task."""
    if job.has_texts:
        return batch_of(job)
    targets = task.stand_ins(job.local_batch, {job.chunk}, lambda tensors: tensors)
    return torch.randn(job.local_batch, 3, *job.vision.image_shape), targets


def highest(run: Any) -> int:
    """The most bytes that `run()` has allocated on top of what there was.

    But for what a convolution allocates for itself: with AMX instructions it is 104 MB for 16 images, on a GPU nothing.
    """
    # What an earlier call allocated the profiler knows: freed in this one, it would count as less than nothing.
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


def sharded_model(job: Job) -> CLIP:
    """The model of `job`, cut over the processes of the present group, with start values."""
    vision = {**job.options.get("vision", {}), "patch_dropout": job.token_dropout}
    model = create_model(job.model, device="meta", savings=job.savings, **{**job.options, "vision": vision})
    shard((model.visual, model.text), *job.sharding())
    model.to_empty(device="cpu").reset_parameters()
    return model


def peak_of_sharded_step(job: Job) -> int:
    """The same as `peak_of_step`, without moments, of one of `job.gpus` processes, the others of which aren't there.

    What arrives from them is not initialised, but what is allocated for it is real.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=job.gpus)
    try:
        model = sharded_model(job)
        images, tokens = batch_of(job)

        def step() -> None:
            clip_loss(*model(images, tokens)).backward()

        step()
        model.zero_grad()
        known = [images, tokens, *model.buffers(), *(local(parameter) for parameter in model.parameters())]
        return sum(value.untyped_storage().nbytes() for value in known) + highest(step)
    finally:
        dist.destroy_process_group()
