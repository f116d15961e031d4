"""The cases as pytest-benchmark sees them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_fakes import machine, tanh, tanh_operation

from benchmarks import test_ops
from benchmarks.candidates import Candidate
from benchmarks.measure import Case
from benchmarks.shapes import parse_shape
from benchmarks.timing import Rotation

ROOT = Path(__file__).parents[2]
CASE = "layer_norm-forward-eva02-b16@224 b1-float32"


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest on the cases, one of them."""
    keywords = (
        "layer_norm and not layer_norm_add and not add_layer_norm and forward and b16 and b1- and float32 and eager"
    )
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", "-k", keywords, *arguments]
    # Beside other tests pytest-benchmark would measure nothing.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="its shape is one of those for processors")
@pytest.mark.exhaustive
def test_a_case_is_measured_and_carries_its_numbers(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    quick = ("--benchmark-only", "--benchmark-max-time=0.01", "--benchmark-min-rounds=3", f"--benchmark-json={report}")
    done = run_pytest(*quick)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(report.read_text())["benchmarks"]
    assert found["name"] == f"test_op[{CASE}-torch eager]"
    assert found["group"] == CASE
    info: dict[str, Any] = found["extra_info"]
    assert info["sizes"] == {"batch": 1, "tokens": 197}
    assert info["bytes"] == 2 * 197 * 768 * 4
    assert info["roofline"] == pytest.approx(info["floor_ms"] / (1e3 * found["stats"]["median"]))


def a_case() -> Case:
    """tanh, forward."""
    return Case(tanh_operation(), parse_shape("eva02-b16@224 b1"), "forward", torch.float32, torch.device("cpu"))


def fake_benchmark() -> Any:
    """As much of the fixture as is used: it calls what it is given twice."""

    class Benchmark:
        group = ""
        stats = SimpleNamespace(stats=SimpleNamespace(data=[0.002, 0.004]))

        def __init__(self) -> None:
            self.extra_info: dict[str, Any] = {}

        def __call__(self, function: Any) -> None:
            function()
            function()

    return Benchmark()


def test_what_fails_is_skipped_with_its_error() -> None:
    broken = Candidate("broken", "peer", "1", lambda shape: lambda x: 1 / 0)
    with pytest.raises(pytest.skip.Exception, match="ZeroDivisionError: division by zero"):
        test_ops.test_op(fake_benchmark(), machine(), a_case(), broken)


def test_a_case_serves_several_candidates() -> None:
    case = a_case()
    for name in ("one", "two"):
        benchmark = fake_benchmark()
        test_ops.test_op(benchmark, machine(), case, Candidate(name, "peer", "1", lambda shape: tanh))
        assert benchmark.extra_info["candidate"] == name
        assert benchmark.extra_info["error"] < 1e-6
    assert case.rows == {}


def test_inputs_rotate_and_times_are_milliseconds() -> None:
    log: list[int] = []
    calls = [lambda: log.append(0), lambda: log.append(1)]
    assert test_ops.FixtureTimer(fake_benchmark()).rounds([Rotation(calls)], seconds=0) == [[2.0, 4.0]]
    assert log == [0, 1]
