"""Who takes part, what is run, and what the machine says of itself."""

from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from typing import Any

import psutil
import pytest
import torch
from bench_fakes import machine, registered, tanh, tanh_operation
from torch import Tensor

from benchmarks import machine as machines
from benchmarks.candidates import candidates
from benchmarks.cases import layer_norm  # noqa: F401  registers the operations
from benchmarks.operation import get_operation, peer
from benchmarks.suite import Plan, list_cases, run
from evaclip.errors import UserError
from evakernels import backends

CPU = torch.device("cpu")


def test_our_backends_are_measured_one_by_one() -> None:
    found, absent = candidates(get_operation("layer_norm"), "cpu", peers=["none"])
    assert [candidate.name for candidate in found] == ["evakernels cpu", "evakernels reference", "torch eager"]
    assert absent == {}


def test_a_backend_that_does_not_exist_is_absent_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._implementations, "tanh_forward", {})
    op = tanh_operation(registered="tanh_forward")
    found, absent = candidates(op, "cpu", backends=["cpu"], peers=["none"])
    assert [candidate.name for candidate in found] == ["torch eager"]
    assert absent == {"evakernels cpu": "tanh_forward has no cpu implementation"}


def test_absent_peers_say_why() -> None:
    _, absent = candidates(get_operation("layer_norm"), "cpu")
    assert absent["liger-kernel"] == "runs on cuda only"
    _, absent = candidates(get_operation("layer_norm"), "cuda")
    assert absent["quack-kernels"] == "not installed: pip install quack-kernels"
    assert absent["apex"].startswith("not installed: from the source of https://github.com/NVIDIA/apex")


def test_peers_can_be_chosen() -> None:
    with registered(tanh_operation(), one=tanh, two=tanh) as op:
        names = [[c.name for c in candidates(op, "cpu", peers=peers)[0]][2:] for peers in ([], ["two"], ["none"])]
    assert names == [["torch eager", "torch.compile", "one", "two"], ["torch eager", "two"], ["torch eager"]]


def test_a_peer_needs_a_name() -> None:
    with pytest.raises(UserError, match="neither a name nor a package"):
        peer("layer_norm")


def test_a_plan_is_the_product_of_its_choices() -> None:
    plan = Plan(shapes=("tiny b2", "tiny b4"), dtypes=("float16",), modes=("training",))
    titles = [case.title for case in list_cases([tanh_operation()], plan)]
    assert titles == [f"tanh, training, tiny@{32} b{batch}, float16" for batch in (2, 4)]
    twice = replace(plan, shapes=("tiny b2", "tiny@32 b2"), dtypes=("float16", "float16"))
    assert len(list_cases([tanh_operation()] * 2, twice)) == 1
    assert len(list_cases([tanh_operation()], Plan())) == 4
    assert len(list_cases([tanh_operation(gradients=())], Plan())) == 2


def test_a_run_has_one_sample_list_a_pass(steady: None) -> None:
    seen: list[tuple[int, int]] = []
    with registered(tanh_operation()) as op:
        results = run(
            [op],
            Plan(dtypes=("float32",), peers=("none",), passes=2, seconds=0.001),
            lambda done, total, title: seen.append((done, total)),
        )
    assert [row.candidate for row in results.rows] == ["evakernels", "evakernels reference", "torch eager"] * 2
    assert all(len(row.samples_ms) == 2 and row.failure is None for row in results.rows)
    assert seen == [(done, 4) for done in range(5)]
    assert results.machine.copy_gbps == 10.0
    assert results.machine.versions["torch"] == metadata.version("torch")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(backends=("gpu",)), "unknown cpu backend 'gpu'"),
        (Plan(backends=("triton",)), "unknown cpu backend 'triton'; known: cpu, reference"),
        (Plan(device="cuda"), "no GPU here"),
    ],
)
def test_wrong_plans_are_refused(plan: Plan, message: str) -> None:
    if plan.device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=message):
        run([get_operation("layer_norm")], plan)


def test_ceilings_are_plausible() -> None:
    copy, matmul = machines.ceilings(CPU, [torch.float32])
    assert 0.1 < copy < 5000
    assert 1e-4 < matmul["float32"] < 1000


def test_the_machine_says_what_it_is(steady: None) -> None:
    described = machines.describe(CPU, [torch.float32], ["numpy", "no-such-distribution"])
    assert described.name
    assert described.threads == torch.get_num_threads()
    assert described.cache_bytes >= 1 << 18
    assert {"python", "torch", "numpy"} <= set(described.versions)
    assert "no-such-distribution" not in described.versions


@pytest.mark.parametrize(
    ("total", "notes"),
    [(110.0, []), (116.0, ["busy: other processes used 30% of the processors during the run"])],
    ids=["quiet", "busy"],
)
def test_a_busy_run_says_so(monkeypatch, steady, total, notes):
    monkeypatch.setattr(machines.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(machines, "_busy_seconds", lambda: (100.0, 50.0, 10.0))
    watch = machines.Watch(machine(), CPU)
    monkeypatch.setattr(machines, "_busy_seconds", lambda: (total, 60.0, 20.0))
    assert watch.notes() == notes


def test_a_product_that_takes_long_is_measured_at_a_smaller_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = []

    def slow(call: Callable[[], Tensor], device: torch.device, **limits: float) -> float:
        sides.append(len(call()))
        return 1e-9 * sides[-1] ** 3

    monkeypatch.setattr(machines, "_best", slow)
    assert machines._product_rate(CPU, torch.float32, 1536) == pytest.approx(2e9)
    assert sides == [256, 512, 512]


def test_ceilings_that_move_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = machines.Watch(machine(), CPU)
    monkeypatch.setattr(machines, "ceilings", lambda device, dtypes: (8.0, {"float32": 0.12, "bfloat16": 0.2}))
    monkeypatch.setattr(machines, "BUSY_SHARE", float("inf"))
    assert watch.notes() == [
        "unsteady: the copy ceiling was 20% lower after the run",
        "unsteady: the float32 matrix product ceiling was 20% higher after the run",
    ]


def test_busy_seconds_are_those_of_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    times: Any = psutil.cpu_times()
    monkeypatch.setattr(machines.psutil, "cpu_times", lambda: times)
    total, own, _ = machines._busy_seconds()
    assert total == pytest.approx(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)
    assert own > 0
