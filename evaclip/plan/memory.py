"""Memory of one GPU over a step: what the trace saw, and by formula what it didn't run."""

from collections import Counter
from dataclasses import dataclass

from evaclip.plan.job import Job
from evaclip.plan.loss import LOSS, loss_bytes
from evaclip.plan.phases import Bytes, Moment, Steps, course, deepen, insert, read
from evaclip.plan.recorder import COMMUNICATION, INPUTS, PARAMETERS
from evaclip.plan.trace import BLOCKS, Trace, trace

OPTIMIZER = "optimizer state"
_STATE_BYTES = {"fp32": 4, "bf16": 2}
_BUCKET = 32 * 2**20
_MOMENTS = 2


@dataclass(frozen=True)
class Memory:
    """Of one GPU, in bytes.

    Attributes:
        steps: the phases of a step, of all blocks; with accumulation of its first and its last chunk.
        moments: the highest of each phase.
        parameters: how many one GPU holds.
        model_parameters: how many the model has.
    """

    steps: Steps
    moments: tuple[Moment, ...]
    parameters: int
    model_parameters: int

    @property
    def peak(self) -> Moment:
        """The highest of all."""
        return max(self.moments, key=lambda moment: moment.total)


def plan_memory(job: Job, blocks: int = BLOCKS) -> Memory:
    """What one GPU needs for a step of `job`, from a trace of this many blocks."""
    return memory_of(job, trace(job, blocks))


def memory_of(job: Job, traced: Trace) -> Memory:
    """The same from a trace that is there."""
    config = job.config
    depths = {"image": config.vision.layers, "text": config.text.layers}
    few = read(traced.recording)
    missing = {tower: depths[tower] - few.blocks(tower) for tower in depths}
    parameters = Counter({PARAMETERS: sum(missing[tower] * traced.block_bytes[tower] for tower in depths)})
    elements = traced.elements["rest"] + sum(depths[tower] * traced.elements[tower] for tower in depths)
    steps = deepen(few, depths["image"], depths["text"], parameters + _besides(job, elements))
    if job.mode == "replicate" and job.gpus > 1:
        steps = insert(steps, "end", peak=Counter({COMMUNICATION: 2 * max(_BUCKET, _largest(job))}))
    if job.accumulation == 1:
        steps = insert(steps, LOSS, peak=loss_bytes(job))
        return Memory(steps, tuple(course(steps)), elements, traced.parameters)
    alone = Moment(LOSS, steps.start + loss_bytes(job))
    return Memory(steps, (alone, *course(steps)), elements, traced.parameters)


def _besides(job: Job, elements: int) -> Bytes:
    """What there is from the start and the trace doesn't hold: moments, and the chunks whose turn it isn't."""
    vision, others = job.config.vision, job.local_batch - job.chunk
    height, width = vision.image_shape
    inputs = others * (3 * height * width * 4 + job.config.text.context_length * 8)
    features = 4 * job.local_batch * job.config.embed_dim * 4 if others else 0
    return Counter(
        {OPTIMIZER: _MOMENTS * elements * _STATE_BYTES[job.state_dtype], INPUTS: inputs, "features": features}
    )


def _largest(job: Job) -> int:
    """Bytes of the largest gradient, which is reduced alone."""
    size = 2 if job.precision in ("bf16", "fp16") else 4
    vision, text = job.config.vision, job.config.text
    return size * max(text.vocab_size * text.width, vision.width * vision.hidden, 3 * vision.width**2)
