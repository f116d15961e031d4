"""Ways to spread a run over its GPUs: parallelism, recomputation, and the fewest micro-batches that fit."""

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

from evaclip.model.config import Recompute
from evaclip.plan.gpus import PER_NODE, Gpu
from evaclip.plan.recorder import AVERAGE, FROZEN, GRADIENTS, OPTIMIZER, PARAMETERS, WHOLE_GRADIENTS
from evaclip.plan.step import StepPlan, plan_step
from evaclip.train.config import MaskedImageTask, ParallelConfig, TrainConfig
from evaclip.train.tasks import task_class


def plan_layouts(config: TrainConfig, gpus: int, gpu: Gpu, caption_tokens: int | None = None) -> list[StepPlan]:
    """A plan for each parallelism and policy of recomputation, sorted by FLOPs and then by memory.

    Each plan has as few micro-batches as fit `gpu`. If parameters and optimizer state alone don't fit, the parallelism
    has one plan only.
    """
    plans = []
    for parallel in _parallelisms(config, gpus):
        for recompute in reversed(get_args(Recompute)):
            savings = replace(config.model.savings, recompute=recompute)
            layout = replace(config, parallel=parallel, model=replace(config.model, savings=savings))
            plans.append(_fewest_micro_batches(layout, gpus, gpu, caption_tokens))
            if _static(plans[-1]) > gpu.room:
                break
    return sorted(plans, key=lambda plan: (sum(plan.flops.values()), plan.memory.total()))


def better_hybrid(plan: StepPlan, gpu: Gpu, caption_tokens: int | None = None) -> StepPlan | None:
    """The plan with shards within nodes, if it fits and its links are busy for a shorter time than those of `plan`."""
    config = plan.config
    if not plan.is_sharded or config.parallel.mode != "shard" or plan.gpus <= PER_NODE or plan.gpus % PER_NODE:
        return None
    parallel = replace(config.parallel, mode="hybrid", shard_size=PER_NODE)
    hybrid = plan_step(replace(config, parallel=parallel), plan.gpus, caption_tokens=caption_tokens)
    fits = hybrid.memory.total() <= gpu.room
    return hybrid if fits and hybrid.link_seconds(gpu) < plan.link_seconds(gpu) else None


def _parallelisms(config: TrainConfig, gpus: int) -> Iterator[ParallelConfig]:
    parallel = config.parallel
    if gpus == 1:
        yield parallel
        return
    shards_teacher = isinstance(config.task, MaskedImageTask) and config.task.teacher.shard
    if parallel.offload == "none" and not shards_teacher:
        yield replace(parallel, mode="replicate", shard_size=None)
    yield replace(parallel, mode="shard", shard_size=None)
    if gpus > PER_NODE and gpus % PER_NODE == 0:
        yield replace(parallel, mode="hybrid", shard_size=PER_NODE)


def _fewest_micro_batches(config: TrainConfig, gpus: int, gpu: Gpu, caption_tokens: int | None) -> StepPlan:
    group = task_class(config.task.name).rows_per_group(config)
    plan = plan_step(replace(config, accumulation_steps=1), gpus, caption_tokens=caption_tokens)
    # Other memory grows at most in proportion to the micro-batch; several micro-batches add gradients that stay.
    needed = plan.memory.total() - _static(plan)
    for number in micro_batch_counts(config.batch_size // gpus // group)[1:]:
        room = gpu.room - _static(plan) - plan.memory[GRADIENTS] - plan.memory[WHOLE_GRADIENTS]
        if plan.memory.total() <= gpu.room or room <= 0:
            break
        if number * room >= needed:
            plan = plan_step(replace(config, accumulation_steps=number), gpus, caption_tokens=caption_tokens)
    return plan


def _static(plan: StepPlan) -> int:
    """Bytes that don't depend on the number of micro-batches."""
    return sum(plan.memory[kind] for kind in (PARAMETERS, FROZEN, OPTIMIZER, AVERAGE))


def micro_batch_counts(batch: int, ratio: float = 1.8) -> list[int]:
    """Numbers of micro-batches for a rank's batch, each at least `ratio` times the one before, equal ones preferred."""
    numbers = [1]
    for number in range(2, batch + 1):
        enough = ratio * numbers[-1]
        if number == batch or (number >= enough and (batch % number == 0 or number >= 2 * enough)):
            numbers.append(number)
    return numbers
