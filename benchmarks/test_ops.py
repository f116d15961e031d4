"""The same cases for pytest-benchmark: `pytest benchmarks --benchmark-only -k "layer_norm and forward"`.

A GPU is measured if there is one, else the CPU. Candidates of one case form a group.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch

from benchmarks.candidates import Candidate, candidates
from benchmarks.machine import describe
from benchmarks.measure import DEFAULT_DTYPES, DTYPES, Case, Plan, list_cases, measure
from benchmarks.operation import load, suite
from benchmarks.results import Machine
from benchmarks.timing import Call, Rotation, Timer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class FixtureTimer(Timer):
    """Lets pytest-benchmark time one candidate and keep the times."""

    def __init__(self, benchmark: Any) -> None:
        super().__init__()
        self._benchmark = benchmark

    def rounds(self, rotations: Sequence[Rotation], seconds: float) -> list[list[float]]:
        """No times: pytest-benchmark has them. Its options replace `seconds`."""
        for rotation in rotations:
            with rotation.context():
                self._benchmark(_each_in_turn(rotation.calls))
        return [[] for _ in rotations]


def _each_in_turn(calls: Sequence[Call]) -> Call:
    turns = cycle(calls)

    def call() -> None:
        next(turns)()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return call


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each candidate of each case."""
    load()
    ops = suite(models=False) + suite(models=True)
    contestants = {op.name: candidates(op, DEVICE)[0] for op in ops}
    pairs = [
        pytest.param(case, candidate, id=f"{_name(case)}-{candidate.name}")
        for case in list_cases(ops, Plan(DEVICE))
        for candidate in contestants[case.op.name]
    ]
    metafunc.parametrize(("case", "candidate"), pairs)


@pytest.fixture(scope="session")
def machine() -> Machine:
    """This machine with its ceilings, from which the roofline follows."""
    return describe(torch.device(DEVICE), [DTYPES[name] for name in DEFAULT_DTYPES[DEVICE]], ())


def test_op(benchmark: Any, machine: Machine, case: Case, candidate: Candidate) -> None:
    """Measures one candidate; skipped with its error if it fails."""
    fresh = replace(case, rows={}, functions={})
    benchmark.group = _name(case)
    measure(fresh, [candidate], machine, FixtureTimer(benchmark), seconds=0)
    if failure := fresh.rows[candidate.name].failure:
        pytest.skip(failure)


def _name(case: Case) -> str:
    return "-".join(case.key[:4])
