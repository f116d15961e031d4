"""One case with all candidates, errors and memory; real measurements of a tiny operation, whose times nobody judges."""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from itertools import groupby
from typing import Any

import pytest
import torch
from bench_fakes import machine, registered, tanh, tanh_but_in_float64, tanh_operation
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import accuracy, memory
from benchmarks.candidates import Candidate, candidates
from benchmarks.cases import layer_norm  # noqa: F401  registers the operations
from benchmarks.measure import Case, Plan, floor_ms, list_cases, measure, run
from benchmarks.operation import Cost, Operation, get_operation, peer
from benchmarks.results import Row
from benchmarks.shapes import parse_shape
from benchmarks.timing import MIN_ROUNDS, Rotation, Timer
from evaclip.errors import UserError
from evakernels import backends

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


def test_failing_candidate_leaves_its_error() -> None:
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
def test_wrong_peer_has_a_reason_and_no_numbers(name: str, mode: str) -> None:
    function, reason = WRONG[name]
    row = rows_of(mode, passes=2, **{name: function})[name]
    assert row.failure == f"wrong: {reason}"
    assert row.mark == "wrong"
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


def test_peer_that_rounds_is_inexact() -> None:
    rows = rows_of("training", rounding=lambda x: x.tanh().bfloat16().float())
    row = rows["rounding"]
    assert row.failure is None
    assert 1e-4 < row.error < accuracy.ROUGHEST
    assert row.baseline_error == rows["torch eager"].error
    assert row.breaks_error_rule


def test_ours_has_a_stricter_rule() -> None:
    def inexact(x: Tensor) -> Tensor:
        return (1 + 3e-6) * x.tanh()

    marks = {name: row.mark for name, row in rows_of(changes={"ours": inexact}, same=inexact).items()}
    assert marks == {"evakernels": "wrong", "evakernels reference": "wrong", "torch eager": "", "same": ""}


def test_allowed_error_of_a_single_number() -> None:
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
        ("quantized", "forward", 1e-7, accuracy.QUANTIZED),
        ("ours", "forward", float("nan"), accuracy.UNRELATED),
    ],
)
def test_allowed_error(kind: str, mode: str, baseline: float | None, allowed: float) -> None:
    assert accuracy.allowed_error(kind, mode, baseline) == pytest.approx(allowed)


def test_no_memory_for_float64_leaves_no_error() -> None:
    rows = rows_of(changes={"eager": tanh_but_in_float64(torch.OutOfMemoryError())}).values()
    assert [(row.failure, row.error, row.baseline_error) for row in rows] == [(None, None, None)] * 3


def test_failing_truth_or_timer_fails_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(changes={"eager": tanh_but_in_float64(RuntimeError("no kernel for float64"))})
    assert {row.failure for row in rows.values()} == {"RuntimeError: no kernel for float64"}

    def broken(*args: object) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(CountingTimer, "rounds", broken)
    assert {row.failure for row in rows_of().values()} == {"RuntimeError: an illegal memory access"}


def test_inputs_rotate_beyond_the_cache() -> None:
    with registered(tanh_operation()) as op:
        case, timer = case_of(op), CountingTimer()
        one_set = 2 * case.shape.width * 4
        contestants, _ = candidates(op, "cpu", peers=["none"])
        measure(case, contestants, machine(cache_bytes=5 * one_set), timer, 0.01)
    assert timer.rotations == [10] * 3


def test_context_surrounds_every_call() -> None:
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


def test_cpu_timer_interleaves_candidates() -> None:
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


def test_saved_bytes_of_recomputation() -> None:
    x = torch.randn(1000, requires_grad=True)

    def chain(x: Tensor) -> Tensor:
        return x.exp().sin().exp()

    assert memory.saved_bytes(lambda: chain(x), CPU) == 8000
    assert (
        memory.saved_bytes(lambda: checkpoint(chain, x.exp(), use_reentrant=False, preserve_rng_state=False), CPU)
        == 4000
    )


def test_relative_error_is_of_the_worst_tensor() -> None:
    truth = [torch.ones(4), torch.ones(4)]
    assert accuracy.relative_error([torch.ones(4), torch.full((4,), 1.5)], truth) == pytest.approx(0.5)
    assert accuracy.relative_error([torch.ones(4), torch.full((4,), float("nan"))], truth) != 0
    with pytest.raises(accuracy.WrongResultError, match=r"shape \(1,\) came back where \(4,\) was expected"):
        accuracy.relative_error([torch.ones(4), torch.ones(1)], truth)


def test_relative_error_of_a_zero_tensor() -> None:
    truth = [torch.full((4,), 100.0), torch.full((9,), 1e-18)]
    assert accuracy.relative_error([truth[0], torch.full((9,), 1e-3)], truth) == pytest.approx(1e-5)
    assert accuracy.relative_error([torch.ones(2)], [torch.zeros(2)]) == 1


# --- many cases -----------------------------------------------------------------------------------------------------


def test_backends_are_separate_candidates() -> None:
    found, absent = candidates(get_operation("layer_norm"), "cpu", peers=["none"])
    assert [candidate.name for candidate in found] == ["evakernels cpu", "evakernels reference", "torch eager"]
    assert absent == {}


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


def test_peer_without_name_is_refused() -> None:
    with pytest.raises(UserError, match="neither a name nor a package"):
        peer("layer_norm")


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
