"""What savings are worth, and what fits."""

from dataclasses import replace
from itertools import pairwise

import pytest

from evaclip import Savings, create_model
from evaclip.plan.fit import Fit, chunkings, fit, largest, room, smallest
from evaclip.plan.gpus import Gpu, get_gpu
from evaclip.plan.job import Job
from evaclip.plan.memory import plan_memory
from evaclip.plan.savings import NOTHING, Rung, ladder

pytestmark = pytest.mark.xdist_group("savings")

# What traces dozens of jobs, or hundreds, to find those that fit.
searched = pytest.mark.exhaustive

A100 = get_gpu("a100-80g")
# A trace takes as long as there are operators, so blocks are few; 343 samples can be cut into 1, 7, 49 or 343 chunks.
JOB = Job(
    model="EVA02-CLIP-B-16", options={"vision": {"layers": 2}, "text": {"layers": 1, "vocab_size": 1000}}, gpus=2,
    global_batch=2 * 343, token_dropout=0.5, savings=Savings(recompute="activations"), samples=10**9,
)  # fmt: skip


@pytest.fixture(scope="module")
def rungs() -> list[Rung]:
    return ladder(JOB, A100)


@searched
def test_the_ladder_ends_with_the_job(rungs: list[Rung]) -> None:
    assert rungs[0].name == NOTHING
    assert rungs[-1].job == JOB
    assert rungs[-1].memory.peak.total == plan_memory(JOB).peak.total
    names = " ".join(rung.name for rung in rungs)
    for saving in ("amp_bf16", "packed", "pooled", "dropout 0.5", "activations", "shard"):
        assert saving in names


@searched
def test_each_saving_saves(rungs: list[Rung]) -> None:
    for before, after in pairwise(rungs):
        less_memory = after.memory.peak.total < before.memory.peak.total
        less_time = sum(after.time.step) < sum(before.time.step)
        assert less_memory or less_time, after.name


def test_savings_that_the_job_lacks_are_left_out() -> None:
    job = replace(JOB, gpus=1, global_batch=64, mode="replicate", token_dropout=0.0, precision="fp32", samples=None)
    job = replace(job, savings=Savings(pack_text=False, pooled_last_block=False))
    assert [rung.name for rung in ladder(job, A100)] == [NOTHING]


def test_chunks_divide_the_batch() -> None:
    assert chunkings(1000) == [1, 2, 4, 8, 20, 40, 100, 200, 500, 1000]
    assert chunkings(1) == [1]
    assert chunkings(7) == [1, 4, 7]
    assert chunkings(1059) == [1, 3, 11, 40, 144, 353, 1059]


def _with_room(bytes_of_a_parameter: int) -> Gpu:
    """One on which tensors may take this many bytes for each parameter of the model of `JOB`."""
    parameters = sum(p.numel() for p in create_model(JOB.model, device="meta", **JOB.options).parameters())
    return replace(A100, memory_gib=bytes_of_a_parameter * parameters / 2**30 + A100.beside_gib[1])


# With its gradient and moments a parameter takes 16: one GPU of this kind is too few for the model, two are enough.
SMALL, TOO_SMALL = _with_room(15), _with_room(5)


@pytest.fixture(scope="module")
def found() -> Fit:
    return fit(JOB, SMALL)


@searched
def test_the_largest_batch_fits_and_no_larger(found: Fit) -> None:
    assert found.largest.fits
    job = found.largest.job
    more = replace(job, global_batch=int(1.03 * job.chunk + 1) * job.gpus)
    assert plan_memory(job).peak.total <= room(SMALL) < plan_memory(more).peak.total


@searched
def test_nothing_fits_a_gpu_that_is_too_small() -> None:
    assert largest(replace(JOB, global_batch=4), TOO_SMALL) is None
    assert smallest(replace(JOB, gpus=1, mode="replicate"), TOO_SMALL) is None


@searched
def test_policies_use_as_few_chunks_as_fit(found: Fit) -> None:
    assert [option.job.savings.recompute for option in found.options] == ["none", "activations", "block"]
    assert max(option.job.accumulation for option in found.options) > 1
    for option in found.options:
        assert option.fits
        fewer = [number for number in chunkings(JOB.local_batch) if number < option.job.accumulation]
        if fewer:
            before = plan_memory(replace(option.job, accumulation=fewer[-1]))
            assert before.peak.total > room(SMALL)


@searched
def test_the_cheapest_and_the_smallest(found: Fit) -> None:
    fitting = [option for option in found.options if option.fits]
    assert sum(found.cheapest.time.step) == min(sum(option.time.step) for option in fitting)
    assert found.smallest.job.gpus == JOB.gpus
    assert found.smallest.job.global_batch == JOB.global_batch
