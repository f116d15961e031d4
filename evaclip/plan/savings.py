"""What each saving is worth: from a run without any, one after another is added."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from evaclip.model.config import Savings
from evaclip.plan.gpus import Gpu
from evaclip.plan.job import Job
from evaclip.plan.memory import Memory, plan_memory
from evaclip.plan.time import Time, plan_time

NOTHING = "nothing saved"


@dataclass(frozen=True)
class Rung:
    """The job with the savings up to this one.

    Attributes:
        name: of the saving that it adds.
    """

    name: str
    job: Job
    memory: Memory
    time: Time


def ladder(job: Job, gpu: Gpu) -> list[Rung]:
    """From plain float32 training to `job`, a saving at a time, without those it lacks and those that save nothing."""
    rungs: list[Rung] = []
    for name, step in _jobs(job):
        if not rungs or step != rungs[-1].job:
            memory = plan_memory(step)
            rung = Rung(name, step, memory, plan_time(step, memory, gpu))
            if rungs and (memory.peak, rung.time) == (rungs[-1].memory.peak, rungs[-1].time):
                rungs[-1] = replace(rung, name=rungs[-1].name)
            else:
                rungs.append(rung)
    return rungs


def _jobs(job: Job) -> Iterator[tuple[str, Job]]:
    wanted = job.savings
    plain = Savings(pack_text=False, pooled_last_block=False, early_drop=False)
    now = replace(
        job,
        precision="fp32",
        token_dropout=0.0,
        mode="replicate",
        offload="none",
        shard_size=None,
        reshard=True,
        state_dtype="fp32",
        savings=plain,
    )
    yield NOTHING, now
    now = replace(now, precision=job.precision)
    yield f"precision {job.precision}", now
    for name, text in (("pack_text", "packed captions"), ("pooled_last_block", "pooled last block")):
        now = replace(now, savings=replace(now.savings, **{name: getattr(wanted, name)}))
        yield text, now
    savings = replace(now.savings, early_drop=wanted.early_drop and job.token_dropout > 0)
    now = replace(now, token_dropout=job.token_dropout, savings=savings)
    yield f"token dropout {job.token_dropout:g}", now
    now = replace(now, savings=replace(now.savings, recompute=wanted.recompute))
    yield f"recomputation: {wanted.recompute}", now
    if job.gpus > 1:
        now = replace(now, mode=job.mode, shard_size=job.shard_size, reshard=job.reshard)
        yield f"parameters, gradients, moments cut ({job.mode})", now
    now = replace(now, state_dtype=job.state_dtype)
    yield f"moments in {job.state_dtype}", now
    if job.offload != "none":
        yield "parameters, gradients, moments in host memory", job
