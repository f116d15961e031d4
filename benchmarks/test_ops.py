"""The same cases for pytest-benchmark: `pytest benchmarks --benchmark-only -k "layer_norm and forward"`.

They are measured on the GPU if there is one, else on the processor. Candidates of one case form a group.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch

import benchmarks.cases
from benchmarks.candidates import Candidate, candidates
from benchmarks.machine import describe
from benchmarks.measure import Case, measure
from benchmarks.operation import suite_operations
from benchmarks.results import Machine
from benchmarks.suite import DEFAULT_DTYPES, DTYPES, Plan, list_cases
from benchmarks.timing import Call, Rotation

__all__ = ["benchmarks"]  # imported for the operations that its cases register

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class FixtureTimer:
    """Lets pytest-benchmark do the timing; see `benchmarks.timing.Timer`."""

    def __init__(self, benchmark: Any) -> None:
        self.launched: dict[int, str] = {}
        self._benchmark = benchmark

    def first_call(self, call: Call) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        call()
        _wait()
        return time.perf_counter() - start

    def rounds(self, rotations: Sequence[Rotation], seconds: float) -> list[list[float]]:
        """Milliseconds of one call; how long to measure is said by pytest-benchmark's options instead of `seconds`."""
        samples = []
        for rotation in rotations:
            calls = cycle(rotation.calls)

            def once(calls: Any = calls) -> None:
                next(calls)()
                _wait()

            with rotation.context():
                self._benchmark(once)
            stats = self._benchmark.stats  # None with --benchmark-disable
            samples.append([1e3 * value for value in stats.stats.data] if stats else [])
        return samples


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each candidate of each case."""
    contestants = {op.name: candidates(op, DEVICE)[0] for op in suite_operations()}
    pairs = [
        pytest.param(case, candidate, id=f"{_name(case)}-{candidate.name}")
        for case in list_cases(suite_operations(), Plan(DEVICE))
        for candidate in contestants[case.op.name]
    ]
    metafunc.parametrize(("case", "candidate"), pairs)


@pytest.fixture(scope="session")
def machine() -> Machine:
    """This machine with its ceilings, from which the roofline follows."""
    return describe(torch.device(DEVICE), [DTYPES[name] for name in DEFAULT_DTYPES[DEVICE]], ())


def test_op(benchmark: Any, machine: Machine, case: Case, candidate: Candidate) -> None:
    """Measures one candidate; skipped with its error if it can't do the case."""
    fresh = replace(case, rows={}, functions={})
    benchmark.group = _name(case)
    measure(fresh, [candidate], machine, FixtureTimer(benchmark), seconds=0)
    row = fresh.rows[candidate.name]
    if row.failure is not None:
        pytest.skip(row.failure)
    names = ("candidate", "version", "sizes", "flops", "bytes", "floor_ms", "peak_bytes", "saved_bytes", "error")
    benchmark.extra_info.update({name: getattr(row, name) for name in names})
    if row.times:
        benchmark.extra_info["roofline"] = row.roofline


def _name(case: Case) -> str:
    return "-".join((case.op.name, case.mode, case.shape.name, str(case.dtype).removeprefix("torch.")))


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
