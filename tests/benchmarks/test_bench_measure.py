"""One case with all candidates, errors and memory; real measurements of a tiny operation, whose times nobody judges."""

from collections.abc import Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import pytest
import torch
from bench_fakes import machine, registered, tanh, tanh_but_in_float64, tanh_operation
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import accuracy, memory
from benchmarks.candidates import Candidate, candidates
from benchmarks.measure import Case, floor_ms, measure
from benchmarks.operation import Cost, Operation
from benchmarks.results import Row
from benchmarks.shapes import parse_shape
from benchmarks.timing import MIN_ROUNDS, Rotation, Timer

CPU = torch.device("cpu")


class CountingTimer:
    """Calls everything once and says that it took a millisecond."""

    def __init__(self) -> None:
        self.rotations: list[int] = []
        self.launched: dict[int, str] = {}

    def first_call(self, call: Any) -> float:
        call()
        return 0.5

    def rounds(self, rotations: Sequence[Rotation], seconds: float) -> list[list[float]]:
        self.rotations = [len(rotation.calls) for rotation in rotations]
        return [[1.0, 1.0] for _ in rotations]


def case_of(op: Operation, mode: str = "forward") -> Case:
    return Case(op, parse_shape("tiny b2"), mode, torch.float32, CPU)


def rows_of(mode: str = "forward", passes: int = 1, changes: Any = None, **peers: Any) -> dict[str, Row]:
    with registered(tanh_operation(**(changes or {})), **peers) as op:
        case = case_of(op, mode)
        contestants, _ = candidates(op, "cpu", peers=list(peers) or ["none"])
        for _ in range(passes):
            measure(case, contestants, machine(), CountingTimer(), 0.01)
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


def test_training_adds_the_backward_pass() -> None:
    row = rows_of("training")["evakernels"]
    assert row.flops == 32
    assert row.floor_ms == pytest.approx((16 / 10e9 + 32 / 0.1e12) * 1e3)
    # tanh keeps its output: 2 samples of the tiny model's width in float32.
    assert row.saved_bytes == 2 * parse_shape("tiny b2").width * 4
    assert 0 < row.error < 1e-6


def test_a_candidate_that_fails_leaves_its_error() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("out of\nluck")

    rows = rows_of(passes=2, broken=broken)
    assert rows["broken"].failure == "RuntimeError: out of luck"
    assert rows["broken"].samples_ms == []
    assert rows["evakernels"].samples_ms == [[1.0, 1.0]] * 2


WRONG = {
    "cut": (lambda x: x.tanh()[:1], "shape (1, 128) came back where (2, 128) was expected"),
    "two": (lambda x: (x.tanh(), x.tanh()), "2 tensors came back where 1 were expected"),
    "rounded": (lambda x: x.tanh().bfloat16(), "torch.bfloat16 came back where torch.float32 was expected"),
    "scaled": (lambda x: 1.01 * x.tanh(), "the outputs have an error of 1.0e-02, at most 3.9e-03 is right"),
    "nan": (lambda x: x.tanh() * float("nan"), "NaN among the outputs"),
}
"""Peers that compute something else, and what is said of them."""


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_peer_has_a_reason_and_no_numbers(name: str, mode: str) -> None:
    function, reason = WRONG[name]
    row = rows_of(mode, passes=2, **{name: function})[name]
    assert row.failure == f"wrong: {reason}"
    assert row.mark == "wrong"
    assert (row.samples_ms, row.first_call_ms, row.peak_bytes, row.saved_bytes) == ([], None, None, None)


def test_wrong_gradients_are_wrong_though_the_outputs_are_right() -> None:
    def twice(x: Tensor) -> Tensor:
        return 2 * x.tanh() - x.tanh().detach()

    assert rows_of("forward", twice=twice)["twice"].failure is None
    row = rows_of("training", twice=twice)["twice"]
    assert row.failure == "wrong: the gradients have an error of 1.0e+00, at most 3.9e-03 is right"
    assert row.error == pytest.approx(1.0, rel=1e-3)


def test_a_peer_that_remembers_its_first_result_is_wrong() -> None:
    first: list[Tensor] = []

    def remembering(x: Tensor) -> Tensor:
        first.append(x.tanh())
        return first[0]

    assert rows_of(remembering=remembering)["remembering"].mark == "wrong"


def test_a_peer_that_rounds_is_inexact_and_not_wrong() -> None:
    rows = rows_of("training", rounding=lambda x: x.tanh().bfloat16().float())
    row = rows["rounding"]
    assert row.failure is None
    assert 1e-4 < row.error < accuracy.ROUGHEST
    assert row.baseline_error == rows["torch eager"].error
    assert row.breaks_error_rule


def test_ours_is_wrong_by_a_stricter_rule() -> None:
    def inexact(x: Tensor) -> Tensor:
        return (1 + 3e-6) * x.tanh()

    marks = {name: row.mark for name, row in rows_of(changes={"ours": inexact}, same=inexact).items()}
    assert marks == {"evakernels": "wrong", "evakernels reference": "wrong", "torch eager": "", "same": ""}


def test_the_error_of_a_lone_number_may_be_small_by_luck() -> None:
    """Of a loss in bfloat16: plain PyTorch errs by 1e-5, and 1e-3 is no mistake."""
    assert accuracy.luck([torch.ones(())], torch.bfloat16) == 2.0**-5
    assert accuracy.luck([torch.ones(()), torch.ones(9)], torch.bfloat16) == accuracy.FINEST
    assert accuracy.allowed_error("ours", "forward", 1e-5, least=2.0**-5) == 2.0**-5


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
        ("ours", "forward", float("nan"), accuracy.UNRELATED),
    ],
)
def test_what_error_is_accepted(kind: str, mode: str, baseline: float | None, allowed: float) -> None:
    assert accuracy.allowed_error(kind, mode, baseline) == pytest.approx(allowed)


def test_without_memory_for_float64_there_is_no_error() -> None:
    rows = rows_of(changes={"eager": tanh_but_in_float64(torch.OutOfMemoryError())}).values()
    assert [(row.failure, row.error, row.baseline_error) for row in rows] == [(None, None, None)] * 3


def test_a_truth_or_a_timer_that_fails_is_a_failure_of_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(changes={"eager": tanh_but_in_float64(RuntimeError("no kernel for float64"))})
    assert {row.failure for row in rows.values()} == {"RuntimeError: no kernel for float64"}

    def broken(*args: object) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(CountingTimer, "rounds", broken)
    assert {row.failure for row in rows_of().values()} == {"RuntimeError: an illegal memory access"}


def test_inputs_go_round_beyond_the_cache() -> None:
    with registered(tanh_operation()) as op:
        case, timer = case_of(op), CountingTimer()
        one_set = 2 * case.shape.width * 4
        contestants, _ = candidates(op, "cpu", peers=["none"])
        measure(case, contestants, machine(cache_bytes=5 * one_set), timer, 0.01)
    assert timer.rotations == [10] * 3


def test_inputs_are_the_same_for_the_same_seed_and_never_zero() -> None:
    case = Case(tanh_operation(), parse_shape("tiny b2"), "forward", torch.bfloat16, CPU)
    assert torch.equal(case.draw(1)["x"], case.draw(1)["x"])
    assert not torch.equal(case.draw(1)["x"], case.draw(2)["x"])
    assert case.draw()["x"].dtype is torch.bfloat16
    assert case.draw()["x"].count_nonzero() > 0


def test_the_context_surrounds_every_call() -> None:
    inside: list[bool] = []
    seen: list[bool] = []

    @contextmanager
    def context() -> Any:
        inside.append(True)
        yield
        inside.pop()

    def watched(x: Tensor) -> Tensor:
        seen.append(bool(inside))
        return x.tanh()

    case = case_of(tanh_operation(), "training")
    candidate = Candidate("watched", "ours", "1", lambda shape: watched, context)
    measure(case, [candidate], machine(), Timer(), 0.001)
    assert case.rows["watched"].failure is None
    assert seen
    assert all(seen)


def test_floor_is_the_longer_of_moving_and_multiplying() -> None:
    assert floor_ms(Cost(flops=1e9, bytes=1e6), "float32", machine()) == pytest.approx(10.0)
    assert floor_ms(Cost(flops=1e9, bytes=1e6), "bfloat16", machine()) == pytest.approx(5.0)
    assert floor_ms(Cost(flops=0, bytes=1e9), "float32", machine()) == pytest.approx(100.0)


def test_cpu_timer_measures_each_candidate_in_every_round() -> None:
    calls: list[str] = []
    rotations = [Rotation([lambda name=name: calls.append(name)]) for name in "ab"]  # type: ignore[misc]
    samples = Timer().rounds(rotations, 0.0)
    assert [len(values) for values in samples] == [MIN_ROUNDS, MIN_ROUNDS]
    assert all(value > 0 for values in samples for value in values)
    turns = [name for name, _ in groupby(calls)]
    assert len(turns) >= MIN_ROUNDS, "one candidate was measured after the other, not in turns"


def test_peak_memory_counts_what_is_held_at_once() -> None:
    x = torch.randn(1000)

    def chain() -> Tensor:
        return ((x + 1) * 2).exp()  # two intermediates at a time

    assert 8000 <= memory.peak_bytes(chain, CPU) < 9000


def test_saved_bytes_leave_inputs_out() -> None:
    x = torch.randn(1000, requires_grad=True)
    assert memory.saved_bytes(lambda: x * x, CPU) == 0
    assert memory.saved_bytes(lambda: x.exp(), CPU) == 4000
    assert memory.saved_bytes(lambda: x.exp() + 1, CPU) == 4000  # the output isn't kept


def test_saved_bytes_count_what_a_recomputation_keeps() -> None:
    x = torch.randn(1000, requires_grad=True)

    def chain(x: Tensor) -> Tensor:
        return x.exp().sin().exp()

    assert memory.saved_bytes(lambda: chain(x), CPU) == 8000
    assert (
        memory.saved_bytes(lambda: checkpoint(chain, x.exp(), use_reentrant=False, preserve_rng_state=False), CPU)
        == 4000
    )


def test_double_keeps_gradients_integers_and_lists() -> None:
    x, index = torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.long)
    double = accuracy.as_double({"x": x, "list": [x.detach()], "index": index, "eps": 1e-6})
    assert double["x"].dtype is torch.float64
    assert double["x"].requires_grad
    assert double["list"][0].dtype is torch.float64
    assert double["index"].dtype is torch.long
    assert double["eps"] == 1e-6


def test_relative_error_is_the_worst_tensor() -> None:
    truth = [torch.ones(4), torch.ones(4)]
    assert accuracy.relative_error([torch.ones(4), torch.full((4,), 1.5)], truth) == pytest.approx(0.5)
    assert accuracy.relative_error([torch.ones(4), torch.full((4,), float("nan"))], truth) != 0
    with pytest.raises(accuracy.WrongResultError, match=r"shape \(1,\) came back where \(4,\) was expected"):
        accuracy.relative_error([torch.ones(4), torch.ones(1)], truth)


def test_a_zero_is_measured_by_the_others() -> None:
    truth = [torch.full((4,), 100.0), torch.full((9,), 1e-18)]
    assert accuracy.relative_error([truth[0], torch.full((9,), 1e-3)], truth) == pytest.approx(1e-5)
    assert accuracy.relative_error([torch.ones(2)], [torch.zeros(2)]) == 1
