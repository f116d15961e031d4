"""Memory of one GPU over a step: what the trace saw, and by formula what it didn't run."""

from collections import Counter
from dataclasses import dataclass, replace

from evaclip.plan.job import Job
from evaclip.plan.loss import LOSS, loss_bytes
from evaclip.plan.phases import Bytes, Moment, Steps, course, deepen, insert
from evaclip.plan.recorder import COMMUNICATION, GRADIENTS, INPUTS, PARAMETERS
from evaclip.plan.trace import BLOCKS, Trace, evaluation_bytes, trace
from evaclip.train.distributed import BUCKET_BYTES

OPTIMIZER, AVERAGE = "optimizer state", "averaged weights"
_COPIES = 2
"""Of a shard under offload: the parameters that a GPU gathers, and the gradient that it has summed."""


@dataclass(frozen=True)
class Memory:
    """Of one GPU, in bytes.

    Attributes:
        steps: the phases of a step, of all blocks; with accumulation of its first and its last chunk.
        moments: the highest of each phase.
        parameters: how many one GPU holds.
        model_parameters: how many the model has.
        flops_per_sample: that the model is known by, forward and backward, nothing left out but dropped patches.
        host: bytes of parameters, gradients and moments that lie in host memory for this GPU.
    """

    steps: Steps
    moments: tuple[Moment, ...]
    parameters: int
    model_parameters: int
    flops_per_sample: float
    host: int = 0

    @property
    def peak(self) -> Moment:
        """The highest of all."""
        return max(self.moments, key=lambda moment: moment.total)


def plan_memory(job: Job, blocks: int = BLOCKS) -> Memory:
    """What one GPU needs for a step of `job`, from a trace of this many blocks."""
    return memory_of(job, trace(job, blocks))


def memory_of(job: Job, traced: Trace) -> Memory:
    """The same from a trace that is there."""
    few, depths = traced.steps, traced.whole.depths
    missing = {tower: depths[tower] - few.blocks(tower) for tower in depths}
    parameters = Counter({PARAMETERS: sum(missing[tower] * traced.block_bytes[tower] for tower in depths)})
    elements = traced.elements["rest"] + sum(depths[tower] * traced.elements[tower] for tower in depths)
    steps = deepen(few, depths, parameters + _besides(job, elements))
    if job.mode == "replicate" and job.gpus > 1:
        most = 3 * BUCKET_BYTES + max(BUCKET_BYTES, 4 * traced.whole.largest)
        steps = _with_buckets(steps, most, 4 // job.gradient_bytes)
    host = 0
    # It is as large as the parameters, in float32, and lies where they do.
    average = 4 * elements * job.averaged
    if job.offload != "none":
        # What is in no tower, such as a temperature, stays on the GPU.
        host = (job.weight_bytes + job.gradient_bytes + job.state_bytes) * (elements - traced.uncut) + average
        steps = _offloaded(steps, job, traced)
    else:
        steps = replace(steps, start=steps.start + Counter({AVERAGE: average}))
    # Of chunks the features are there before the first backward pass, and the loss is on its own.
    alone = [] if job.accumulation == 1 else [Moment(LOSS, steps.start + loss_bytes(job))]
    if job.evaluated:
        alone.append(Moment("evaluation", steps.start + evaluation_bytes(job)))
    if job.accumulation == 1:
        steps = insert(steps, LOSS, peak=loss_bytes(job))
    moments, whole = (*alone, *course(steps)), traced.whole
    return Memory(steps, moments, elements, whole.parameters, whole.flops_per_sample, host)


def _with_buckets(steps: Steps, most: int, wider: int) -> Steps:
    """The step with the copies of gradients that are on their way to their mean, in its last backward pass.

    Args:
        most: bytes of all copies.
        wider: bytes of a copy over those of the gradient.
    """
    phases, made = [], 0
    last = max(i for i, phase in enumerate(steps.phases) if phase.name == "loss")
    for index, phase in enumerate(steps.phases):
        # One that isn't full waits, until the pass is over.
        begun = made if phase.name == "end" else made // BUCKET_BYTES * BUCKET_BYTES
        moving = Counter({COMMUNICATION: min(most, begun) if index > last else 0})
        phases.append(replace(phase, peak=phase.peak + moving))
        made += wider * phase.kept[GRADIENTS]
    return Steps(steps.start, tuple(phases))


def _offloaded(steps: Steps, job: Job, traced: Trace) -> Steps:
    """The step without what lies in host memory, and with the copies that are on their way to it or from it."""
    largest = max(traced.elements.values())
    copies = Counter({COMMUNICATION: _COPIES * job.weight_bytes * largest})
    start = Counter({kind: size for kind, size in steps.start.items() if kind not in (PARAMETERS, OPTIMIZER)})
    # Whole gradients that chunks leave on the GPU are none of the parameters' yet, and stay counted.
    phases = tuple(
        replace(phase, kept=_without_gradients(phase.kept), peak=_without_gradients(phase.peak))
        for phase in steps.phases
    )
    return Steps(start + copies, phases)


def _without_gradients(change: Bytes) -> Bytes:
    return Counter({kind: size for kind, size in change.items() if kind != GRADIENTS})


def _besides(job: Job, elements: int) -> Bytes:
    """What there is from the start and the trace doesn't hold: moments, and what chunks need to know of each other.

    Images and tokens of the chunks whose turn it isn't wait in host memory; which patches are kept is drawn for all.
    """
    others = job.local_batch - job.chunk
    kept_tokens = others * job.kept_patches * 8 if job.token_dropout else 0
    features = 4 * job.local_batch * job.config.embed_dim * 4 if others and job.couples else 0
    return Counter({OPTIMIZER: elements * job.state_bytes, INPUTS: kept_tokens, "features": features})
