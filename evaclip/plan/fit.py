"""What fits: the largest batch of a GPU, the cheapest policy, the smallest number of GPUs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import get_args

from evaclip.model.config import Recompute
from evaclip.plan.gpus import PER_NODE, Gpu
from evaclip.plan.job import Job, Mode
from evaclip.plan.memory import Memory, plan_memory
from evaclip.plan.time import Time, plan_time

_ACCURACY = 0.02


@dataclass(frozen=True)
class Option:
    """One way to run a job."""

    job: Job
    memory: Memory
    time: Time
    fits: bool


@dataclass(frozen=True)
class Fit:
    """What was found; None where nothing fits.

    Attributes:
        largest: the job with the most samples a GPU, as it is planned otherwise.
        options: each policy of recomputation with as few chunks as fit, or with as many as there can be.
        cheapest: the fastest of those that fit.
        smallest: the cheapest that the fewest GPUs can run.
    """

    largest: Option | None
    options: tuple[Option, ...]
    cheapest: Option | None
    smallest: Option | None


def fit(job: Job, gpu: Gpu) -> Fit:
    """Searches; takes a trace of one to two seconds for each point that it looks at."""
    options = tuple(policies(job, gpu))
    return Fit(largest(job, gpu), options, _fastest(options), smallest(job, gpu))


def room(gpu: Gpu) -> int:
    """Bytes that tensors may take, if all else takes the most that is assumed."""
    return gpu.memory - int(gpu.beside_gib[1] * 2**30)


def option(job: Job, gpu: Gpu) -> Option:
    """The job as it stands."""
    memory = plan_memory(job)
    return Option(job, memory, plan_time(job, memory, gpu), memory.peak.total <= room(gpu))


def policies(job: Job, gpu: Gpu) -> Iterator[Option]:
    """Each policy of recomputation, with the fewest chunks that fit."""
    for recompute in get_args(Recompute):
        yield _in_chunks(replace(job, savings=replace(job.savings, recompute=recompute)), gpu)


def _in_chunks(job: Job, gpu: Gpu) -> Option:
    """The job with the fewest chunks that fit, or with the most that there can be."""

    def at(number: int) -> Option:
        return option(replace(job, accumulation=number), gpu)

    found, numbers = at(1), chunkings(job.local_batch // job.together)[1:]
    # One chunk needs no gradients besides its own; of two and more, the more the less.
    if found.fits or not numbers:
        return found
    found = at(numbers.pop())
    while found.fits and numbers:
        place = len(numbers) // 2
        tried = at(numbers[place])
        if tried.fits:
            found, numbers = tried, numbers[:place]
        else:
            numbers = numbers[place + 1 :]
    return found


def chunkings(batch: int, ratio: float = 1.8) -> list[int]:
    """Numbers of chunks to cut a batch into, equal ones if there are, each at least `ratio` times the one before."""
    numbers = [1]
    for number in range(2, batch + 1):
        enough = ratio * numbers[-1]
        if number == batch or (number >= enough and (batch % number == 0 or number >= 2 * enough)):
            numbers.append(number)
    return numbers


def largest(job: Job, gpu: Gpu) -> Option | None:
    """The most samples that one GPU can take in one chunk; the global batch grows with them."""
    together = job.together

    @cache
    def at(groups: int) -> Option:
        return option(replace(job, global_batch=groups * together * job.gpus, accumulation=1), gpu)

    low, high = 0, 0
    guess = max(job.chunk // together, 2)
    while high == 0 or high - low > max(1, _ACCURACY * low):
        fits = at(guess).fits
        low, high = (guess, high) if fits else (low, guess)
        if high == 0:
            guess *= 2
        elif low == 0:
            guess = high // 2
        else:
            guess = min(max(_between(at(low), at(high), gpu), low + 1), high - 1)
        if guess < 1 or high - low <= 1 < high:
            break
    return at(low) if low else None


def _between(low: Option, high: Option, gpu: Gpu) -> int:
    """Bytes grow in proportion to samples, but for what there is without any and the matrix of the logits."""
    (a, x), (b, y) = ((o.memory.peak.total, o.job.chunk // o.job.together) for o in (low, high))
    return x + int((y - x) * (room(gpu) - a) / (b - a))


def smallest(job: Job, gpu: Gpu) -> Option | None:
    """The fewest GPUs, of one node or of whole nodes, that can run the job with its whole batch."""
    for count in _counts(job.gpus):
        if job.global_batch < count * job.together:
            break
        mode: Mode = "replicate" if count == 1 and job.offload == "none" else "shard"
        smaller = replace(job, gpus=count, mode=mode, shard_size=None, reshard=True, accumulation=1)
        if _can_fit(smaller, gpu):
            return _fastest(tuple(policies(smaller, gpu)))
    return None


def _can_fit(job: Job, gpu: Gpu) -> bool:
    thrifty = replace(job, savings=replace(job.savings, recompute="block"))
    ends = {1, job.local_batch // job.together}
    return any(option(replace(thrifty, accumulation=accumulation), gpu).fits for accumulation in ends)


def _counts(most: int) -> list[int]:
    in_a_node = [count for count in (1, 2, 4, PER_NODE) if count <= most]
    return [*in_a_node, *range(2 * PER_NODE, most + 1, PER_NODE)]


def _fastest(options: tuple[Option, ...]) -> Option | None:
    fitting = [option for option in options if option.fits]
    return min(fitting, key=lambda option: sum(option.time.step), default=None)
