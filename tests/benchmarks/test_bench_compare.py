"""Differences of two results: regressions, suspects, improvements, and reasons for doubt."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from bench_fakes import machine, row

from benchmarks.compare import Comparison, compare
from benchmarks.results import Results
from evaclip.errors import UserError

OPS = ("swiglu", "lamb")
SHAPES = tuple(f"eva02-b16@224 b{batch}" for batch in (1, 2, 4, 8))
CANDIDATES = (("torch eager", "baseline"), ("evakernels cpu", "ours"))


def measured(slower: Mapping[tuple[str, str], float] | None = None, drift: float = 1.0, noise: float = 1.0) -> Results:
    """Three passes of two operations; `slower` has factors of our times by operation and shape."""
    results = Results(machine(), [])
    for op, shape, (name, kind) in itertools.product(OPS, SHAPES, CANDIDATES):
        own = drift * ((slower or {}).get((op, shape), 1.0) if kind == "ours" else 1.0)
        samples = [[own], [own * noise], [own * noise]]
        results.rows.append(row(op=op, shape=shape, candidate=name, kind=kind, samples_ms=samples))
    return results


def in_all_shapes(op: str, factor: float) -> dict[tuple[str, str], float]:
    return {(op, shape): factor for shape in SHAPES}


def changed(**changes: Any) -> Comparison:
    """One row of this library, before and after a change, with an unchanged baseline."""
    baseline = row(candidate="torch eager", kind="baseline")
    old = row(error=1e-7, peak_bytes=1000, saved_bytes=500)
    return compare(Results(machine(), [baseline, old]), Results(machine(), [baseline, replace(old, **changes)]))


def whats(comparison: Comparison) -> list[str]:
    """What became worse."""
    return [difference.kind for difference in comparison.regressions]


@pytest.mark.parametrize("drift", [1.0, 1.3, 1 / 1.3])
def test_slower_op_is_found_under_drift(drift: float) -> None:
    same = compare(measured(), measured(drift=drift))
    assert (same.regressions, same.drift) == ([], pytest.approx(drift))
    found = compare(measured(), measured(in_all_shapes("swiglu", 1.2), drift))
    assert {(one.row.op, one.row.candidate) for one in found.regressions} == {("swiglu", "evakernels cpu")}
    assert {one.kind for one in found.regressions} == {"slower"}


def test_the_threshold_decides() -> None:
    before = Results(machine(), [row(samples_ms=[[1.0], [1.0], [1.0]])])
    after = Results(machine(), [row(samples_ms=[[1.15], [1.15], [1.15]])])
    assert whats(compare(before, after, 0.1)) == ["slower"]
    assert whats(compare(before, after, 0.2)) == []
    faster = compare(after, before, 0.1)
    assert (faster.regressions, [one.kind for one in faster.others]) == ([], ["faster"])
    peers = [replace(results.rows[0], candidate="peer", kind="peer") for results in (before, after)]
    slower = compare(replace(before, rows=[row(), peers[0]]), replace(after, rows=[row(), peers[1]]))
    assert (slower.regressions, [one.kind for one in slower.others]) == ([], ["slower"])


def test_unsteady_passes_hide_a_change() -> None:
    steady, unsteady, one_slow = [[1.0], [1.0], [1.0]], [[1.0], [1.2], [1.2]], [[1.0], [1.0], [1.3]]
    slower = [[1.25], [1.25], [1.25]]
    for before, expected in ((steady, ["slower"]), (unsteady, []), (one_slow, [])):
        found = compare(Results(machine(), [row(samples_ms=before)]), Results(machine(), [row(samples_ms=slower)]))
        assert whats(found) == expected


def test_old_failure_is_no_regression() -> None:
    before = Results(machine(), [row(failure="RuntimeError: no kernel", samples_ms=[])])
    assert compare(before, before).regressions == []
    found = compare(before, Results(machine(), [row()]))
    assert (found.regressions, [one.kind for one in found.others]) == ([], ["works again"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"failure": "RuntimeError: no kernel", "samples_ms": []}, ["fails"]),
        ({"error": 1.9e-7}, []),
        ({"error": 2.1e-7}, ["less exact"]),
        ({"error": float("nan")}, ["less exact"]),
        ({"peak_bytes": 1090}, []),
        ({"peak_bytes": 1110}, ["peak memory"]),
        ({"saved_bytes": 600}, ["saved memory"]),
        ({"saved_bytes": 100, "peak_bytes": 10, "error": 0.0}, []),
        ({"saved_bytes": None, "peak_bytes": None, "error": None}, []),
    ],
)
def test_failures_errors_and_memory(change: dict[str, Any], expected: list[str]) -> None:
    assert whats(changed(**change)) == expected


@pytest.mark.parametrize("setup", [{"name": "Another CPU"}, {"threads": 8}])
def test_other_machine_has_no_regressions(setup: dict[str, Any]) -> None:
    after = replace(measured(in_all_shapes("swiglu", 2.0), drift=2.0), machine=machine(**setup))
    after.rows[1] = replace(after.rows[1], failure="RuntimeError: too large", samples_ms=[])
    found = compare(measured(), after)
    assert (found.other_setup, found.regressions, found.drift) == (tuple(setup), [], 1.0)
    assert sum(one.kind == "fails" for one in found.others) == 1
    slower = [one.change for one in found.others if (one.row.op, one.row.kind) == ("swiglu", "ours") and one.change]
    assert slower == [pytest.approx(4)] * 3


def test_notes_of_both_results() -> None:
    before = Results(machine(versions={"torch": "2.11"}, notes=["busy"]), [row(samples_ms=[[1.0]])])
    after = Results(machine(versions={"torch": "2.12"}, notes=["throttled"]), [row(samples_ms=[[1.0]])])
    notes = compare(before, after).notes
    assert notes[:2] == ["before: busy", "after: throttled"]
    assert notes[2].startswith("PyTorch 2.11 became 2.12")
    assert notes[3].startswith("a single pass")
    assert changed().notes == []


def test_single_slow_row_is_a_suspect() -> None:
    one = compare(measured(), measured({("lamb", SHAPES[0]): 2.0}))
    assert [(found.row.op, found.row.shape) for found in one.suspects] == [("lamb", SHAPES[0])]
    assert not one.regressions
    both = compare(measured(), measured({("lamb", shape): 2.0 for shape in SHAPES[:2]}))
    assert {found.row.shape for found in both.regressions} == set(SHAPES[:2])
    assert not both.suspects


def test_shift_of_all_rows_of_an_op() -> None:
    """No row is slower in every pass."""
    found = compare(measured(noise=1.4), measured(in_all_shapes("lamb", 1.2), noise=1.4))
    (shift,) = found.regressions
    assert (shift.row.op, shift.row.candidate, shift.rows) == ("lamb", "evakernels cpu", len(SHAPES))
    assert shift.change == pytest.approx(1.2)
    assert not compare(measured(noise=1.4), measured(noise=1.4)).regressions


def test_wrong_threshold_is_refused() -> None:
    results = Results(machine(), [row()])
    for threshold in (0.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="above 0"):
            compare(results, results, threshold)
    with pytest.raises(UserError, match="no row of evakernels in common"):
        compare(results, Results(machine(), [row(device="cuda")]))
