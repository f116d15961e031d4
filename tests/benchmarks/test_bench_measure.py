"""One case with all candidates and their errors, on a tiny operation."""

from dataclasses import replace
from importlib import metadata
from typing import Any

import pytest
import torch
from bench_fakes import CPU, FakeTimer, machine, registered, tanh, tanh_operation
from torch import Tensor

from benchmarks import accuracy
from benchmarks.candidates import candidates
from benchmarks.cases import layer_norm  # noqa: F401  registers the operations
from benchmarks.measure import Case, Plan, list_cases, measure, run
from benchmarks.operation import Operation, get_operation
from benchmarks.results import Row
from benchmarks.shapes import parse_shape
from evakernels import backends


def case_of(op: Operation, mode: str = "forward") -> Case:
    return Case(op, parse_shape("tiny b2"), mode, torch.float32, CPU)


def rows_of(mode: str = "forward", passes: int = 1, changes: Any = None, **peers: Any) -> dict[str, Row]:
    with registered(tanh_operation(**(changes or {})), **peers) as op:
        case = case_of(op, mode)
        contestants, _ = candidates(op, "cpu", peers=list(peers) or ["none"])
        for _ in range(passes):
            measure(case, contestants, machine(), FakeTimer(), 0.01)
    return case.rows


def test_every_candidate_gets_a_row() -> None:
    rows = rows_of(passes=3, mine=tanh)
    assert list(rows) == ["evakernels", "evakernels reference", "torch eager", "mine"]
    assert [row.kind for row in rows.values()] == ["ours", "ours", "baseline", "peer"]
    for row in rows.values():
        assert row.failure is None
        assert row.samples_ms == [[1.0, 1.0]] * 3
        assert row.first_call_ms == 500.0
        assert row.bytes == 16
        assert row.floor_ms == pytest.approx(16 / 10e9 * 1e3)


WRONG = {
    "cut": (lambda x: x.tanh()[:1], "wrong: shape (1, 128) came back where (2, 128) was expected"),
    "two": (lambda x: (x.tanh(), x.tanh()), "wrong: 2 tensors came back where 1 were expected"),
    "rounded": (lambda x: x.tanh().bfloat16(), "wrong: torch.bfloat16 came back where torch.float32 was expected"),
    "scaled": (lambda x: 1.01 * x.tanh(), "wrong: the outputs have an error of 1.0e-02, at most 3.9e-03 is right"),
    "nan": (lambda x: x.tanh() * float("nan"), "wrong: NaN among the outputs"),
    "broken": (lambda x: x.view(3), "RuntimeError: "),
}
"""Peers that compute something else or fail, and their failures."""


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_wrong_peer_has_a_reason_and_no_numbers(mode: str) -> None:
    rows = rows_of(mode, passes=2, **{name: function for name, (function, _) in WRONG.items()})
    assert rows["evakernels"].samples_ms == [[1.0, 1.0]] * 2
    for name, (_, failure) in WRONG.items():
        row = rows[name]
        assert row.failure.startswith(failure)
        assert row.mark == ("failed" if name == "broken" else "wrong")
        assert (row.samples_ms, row.first_call_ms, row.peak_bytes, row.saved_bytes) == ([], None, None, None)


def test_wrong_gradients_of_right_outputs() -> None:
    def twice(x: Tensor) -> Tensor:
        return 2 * x.tanh() - x.tanh().detach()

    assert rows_of("forward", twice=twice)["twice"].failure is None
    row = rows_of("training", twice=twice)["twice"]
    assert row.failure == "wrong: the gradients have an error of 1.0e+00, at most 3.9e-03 is right"
    assert row.error == pytest.approx(1.0, rel=1e-3)


def test_peer_that_caches_its_result_is_wrong() -> None:
    first: list[Tensor] = []

    def remembering(x: Tensor) -> Tensor:
        first.append(x.tanh())
        return first[0]

    assert rows_of(remembering=remembering)["remembering"].mark == "wrong"


@pytest.mark.parametrize(
    ("kind", "mode", "baseline", "allowed"),
    [
        ("ours", "forward", 1e-3, 2e-3),
        ("ours", "training", 1e-3, 3e-3),
        ("ours", "forward", 1e-9, accuracy.FINEST),
        ("peer", "forward", 1e-3, 1e-2),
        ("peer", "forward", 1e-7, accuracy.ROUGHEST),
        ("peer", "training", 0.18, 0.54),
        ("peer", "training", 0.1, accuracy.UNRELATED),
        ("peer", "forward", None, accuracy.UNRELATED),
        ("quantized", "forward", 1e-7, accuracy.QUANTIZED),
        ("ours", "forward", float("nan"), accuracy.UNRELATED),
    ],
)
def test_allowed_error(kind: str, mode: str, baseline: float | None, allowed: float) -> None:
    assert accuracy.allowed_error(kind, mode, baseline) == pytest.approx(allowed)


@pytest.mark.parametrize(
    ("error", "failure"), [(torch.OutOfMemoryError(), None), (RuntimeError("no kernel"), "RuntimeError: no kernel")]
)
def test_failing_truth_leaves_no_error_or_time(error, failure):
    """Without memory for float64 there are times and no errors."""

    def eager(x: Tensor) -> Tensor:
        if x.dtype is torch.float64:
            raise error
        return x.tanh()

    rows = rows_of(changes={"eager": eager}).values()
    assert [(row.failure, row.error, row.baseline_error) for row in rows] == [(failure, None, None)] * 3


def test_failing_timer_fails_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(FakeTimer, "rounds", broken)
    assert {row.failure for row in rows_of().values()} == {"RuntimeError: an illegal memory access"}


# --- many cases -----------------------------------------------------------------------------------------------------


def test_missing_backend_is_absent_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._implementations, "tanh_forward", {})
    op = tanh_operation(registered="tanh_forward")
    found, absent = candidates(op, "cpu", backends=["cpu"], peers=["none"])
    assert [candidate.name for candidate in found] == ["torch eager"]
    assert absent == {"evakernels cpu": "tanh_forward has no cpu implementation"}


def test_absent_peers_have_a_reason() -> None:
    _, absent = candidates(get_operation("layer_norm"), "cpu")
    assert absent["liger-kernel"] == "runs on cuda only"
    _, absent = candidates(get_operation("layer_norm"), "cuda")
    assert absent["quack-kernels"] == "not installed: pip install quack-kernels"
    assert absent["apex"].startswith("not installed: from the source of https://github.com/NVIDIA/apex")


def test_peers_can_be_chosen() -> None:
    with registered(tanh_operation(), one=tanh, two=tanh) as op:
        names = [[c.name for c in candidates(op, "cpu", peers=peers)[0]][2:] for peers in ([], ["two"], ["none"])]
    assert names == [["torch eager", "torch.compile", "one", "two"], ["torch eager", "two"], ["torch eager"]]


def test_plan_is_the_product_of_its_choices() -> None:
    plan = Plan(shapes=("tiny b2", "tiny b4"), dtypes=("float16",), modes=("training",))
    titles = [case.title for case in list_cases([tanh_operation()], plan)]
    assert titles == [f"tanh, training, tiny@{32} b{batch}, float16" for batch in (2, 4)]
    twice = replace(plan, shapes=("tiny b2", "tiny@32 b2"), dtypes=("float16", "float16"))
    assert len(list_cases([tanh_operation()] * 2, twice)) == 1
    assert len(list_cases([tanh_operation()], Plan())) == 4
    assert len(list_cases([tanh_operation(gradients=())], Plan())) == 2


def test_run_has_one_sample_list_a_pass(steady: None) -> None:
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


def test_backends_are_separate_candidates() -> None:
    found, absent = candidates(get_operation("layer_norm"), "cpu", peers=["none"])
    assert [candidate.name for candidate in found] == ["evakernels cpu", "evakernels reference", "torch eager"]
    assert absent == {}
