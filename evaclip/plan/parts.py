"""The parts of a run with one image size each: what each takes, and the whole of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from evaclip.plan.gpus import Gpu
from evaclip.plan.host import decoding_cores
from evaclip.plan.job import Job, known_steps
from evaclip.plan.memory import Memory, plan_memory
from evaclip.plan.tables import numbers
from evaclip.plan.time import Time, plan_time
from evaclip.plan.time_tables import Range, spread
from evaclip.train.config import TrainConfig
from evaclip.train.schedule import image_parts

_GIB = 2**30


@dataclass(frozen=True)
class Part:
    """A part of a run, as a job of its own.

    Attributes:
        steps: how many it has; None for what isn't known.
    """

    job: Job
    steps: int | None
    memory: Memory
    time: Time

    @property
    def gpu_hours(self) -> Range | None:
        return None if self.steps is None else self.time.gpu_hours(self.job)


def plan_parts(config: TrainConfig, job: Job, gpu: Gpu) -> list[Part]:
    """The parts of a run, in their order; one where all steps have the model's own image size.

    Raises:
        UserError: the model can't take an image size.
    """
    schedule, total = config.schedule, known_steps(config)
    if total is None:
        sizes = [part.image_size for part in schedule.resolutions]
        return [_part(job, size, None, gpu) for size in (*sizes, None)]
    return [_part(job, size, len(steps), gpu) for steps, size in image_parts(total, schedule)]


def _part(job: Job, size: int | None, steps: int | None, gpu: Gpu) -> Part:
    if size is not None:
        # Evaluations have the model's own size in every part.
        job = replace(job, options=job.with_vision(image_size=size), evaluated=0)
    job = replace(job, samples=None if steps is None else steps * job.global_batch)
    memory = plan_memory(job)
    return Part(job, steps, memory, plan_time(job, memory, gpu))


def run_hours(parts: Sequence[Part]) -> Range | None:
    """GPU-hours of all parts, slow and fast; None for what isn't known."""
    hours = [each for part in parts if (each := part.gpu_hours)]
    return (sum(slow for slow, _ in hours), sum(fast for _, fast in hours)) if len(hours) == len(parts) else None


def parts_tree(parts: Sequence[Part], images_per_core: float | None) -> list[dict[str, Any]]:
    """Of each part, as plain data; ranges are [slow, fast]."""
    trees = []
    for part in parts:
        tree = {
            "image_size": part.job.vision.image_size,
            "steps": part.steps,
            "peak": part.memory.peak.total,
            "flops": sum(sum(of_stage.values()) for of_stage in part.time.flops.values()),
            "seconds": part.time.step,
            "gpu_hours": part.gpu_hours,
        }
        if images_per_core:
            tree["decoding_cores_of_a_node"] = decoding_cores(part.job, part.time, images_per_core)
        trees.append(tree)
    return trees


def parts_table(parts: Sequence[Part], images_per_core: float | None) -> Table:
    """The same for a terminal, with the whole run's hours."""
    cores = ["decoding cores of a node"] if images_per_core else []
    columns = ("image size", "steps", "GiB", "TFLOP of a GPU and step", "seconds a step", "GPU-hours", *cores)
    table = numbers(*columns, title="Parts of the run: predicted, from slow to fast")
    for tree in parts_tree(parts, images_per_core):
        count = "?" if tree["steps"] is None else f"{tree['steps']:,}"
        of_step = f"{tree['peak'] / _GIB:.2f}", f"{tree['flops'] / 1e12:,.1f}", spread(tree["seconds"])
        took = spread(tree["gpu_hours"]) if tree["gpu_hours"] else "?"
        cores = [spread(tree["decoding_cores_of_a_node"])] if images_per_core else []
        table.add_row(f"{tree['image_size']}", count, *of_step, took, *cores)
    if hours := run_hours(parts):
        table.add_section()
        days = [each / parts[0].job.gpus / 24 for each in hours]
        steps = sum(part.steps or 0 for part in parts)
        table.add_row("all", f"{steps:,}", "", "", "", f"{spread(hours)}, {days[0]:.1f} to {days[1]:.1f} days")
    return table
