"""A fault of each kind, put into a training; `faults/inject.py` does so as often as asked."""

import random
from typing import Any

import pytest
from faults.inject import EVERY, KINDS, STEPS, Bench, draw

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults") / "bench")


def first_of(kind: str) -> int:
    """The smallest seed that draws this kind; if it strikes in a step, one that has two checkpoints behind it."""

    def fits(fault: dict[str, Any]) -> bool:
        return fault["kind"] == kind and fault.get("step", STEPS) > 2 * EVERY

    return next(seed for seed in range(1000) if fits(draw(random.Random(seed))[0]))


@pytest.mark.slow
@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_changes_nothing(kind: str, bench: Bench) -> None:
    outcome = bench.strike(0, *draw(random.Random(first_of(kind))))
    assert outcome.problems == []


@pytest.mark.slow
@pytest.mark.xdist_group("faults")
def test_the_last_checkpoint_survives_a_slow_disk(bench: Bench) -> None:
    outcome = bench.strike(1, {"kind": "slow disk", "rank": 1, "save": STEPS // EVERY, "seconds": 9}, "shard")
    assert (outcome.problems, outcome.starts) == ([], 1)


@pytest.mark.slow
@pytest.mark.xdist_group("faults")
def test_ranks_wait_for_the_last_checkpoint(bench: Bench) -> None:
    """Torchrun would kill the one that writes."""
    fault = {"kind": "SIGTERM", "rank": 1, "step": 6, "seconds": 0.0, "save": 4, "slow": 5.0}
    outcome = bench.strike(2, fault, "replicate")
    assert (outcome.problems, outcome.starts) == ([], 1)
    assert "; --resume auto goes on from step " in (bench.folder / "told.txt").read_text()
