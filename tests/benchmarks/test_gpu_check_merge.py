"""What becomes of journals: a result, tables in the page, launch configurations."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import machine, row
from rich.console import Console

from benchmarks.gpu_check import summary
from benchmarks.gpu_check.merge import merge
from benchmarks.gpu_check.records import Journal
from benchmarks.results import read_results
from evaclip.errors import UserError
from evakernels import tuning

CARD = "NVIDIA H100 80GB HBM3"
PAGE = (
    "# GPU\n\n<!-- gpu-check: begin -->old<!-- gpu-check: end -->\n<!-- benchmarks: begin --><!-- benchmarks: end -->\n"
)


def repository_in(top: Path) -> Path:
    for name in ("benchmarks/results", "docs", "evakernels/tuning"):
        (top / name).mkdir(parents=True, exist_ok=True)
    (top / "docs/gpu-check.md").write_text(PAGE)
    return top


def journal_in(top, name="a", *, rehearsal=False, commit="c0ffee", card=CARD):
    journal = Journal(top / f"{name}.jsonl")
    described = {"name": card, "driver": "580.1", "evakernels": {"torch": "2.11.0"}}
    journal.append("header", schema=1, rehearsal=rehearsal, commit=commit, bundle="", machine=described)
    return journal


def end(journal: Journal, stage: str, unit: str, case: str, status: str = "passed", **data: Any) -> None:
    journal.append("end", stage=stage, unit=unit, case=case, status=status, seconds=1.0, data=data, error="no" * 2)


def timed(journal: Journal, milliseconds: float) -> None:
    measured = asdict(machine(device="cuda", name=CARD, commit="c0ffee", date="2026-11-27T10:00:00"))
    end(journal, "timing", "machine", "ceilings", **measured)
    for op in ("swiglu", "layer_norm"):
        rows = [
            asdict(row(op=op, device="cuda", candidate="evakernels cuda", samples_ms=[[milliseconds] * 8])),
            asdict(row(op=op, device="cuda", candidate="torch eager", kind="baseline", samples_ms=[[5.0] * 8])),
        ]
        told = {"ms": 0.5, "limiter": "DRAM", "gpu": "h100-80g"} if op == "swiglu" else None
        absent = {f"{op}: apex": "no"}
        end(journal, "timing", f"op: {op}", op, rows=rows, absent=absent, notes=["throttled"], predicted=told)


def test_journals_become_a_result_and_tables(tmp_path: Path) -> None:
    first, second = journal_in(tmp_path, "a"), journal_in(tmp_path, "b")
    timed(first, 2.0)
    end(first, "first_light", "cuda", "gelu_forward on cuda", "failed")
    step = {"seconds": 0.25, "samples_per_second": 2048.0, "mfu": 0.41, "peak_bytes": 2**35, "planned_bytes": 2**34}
    end(first, "timing", "step", "EVA02-CLIP-B-16 b512", **step)
    end(first, "why", "gelu", "gelu on cuda", kernel="gelu_forward<8>(Params)", nanoseconds=12500.0, registers=64)
    timed(second, 1.0)
    end(second, "first_light", "cuda", "gelu_forward on cuda")
    written = merge([first.path, second.path], root=repository_in(tmp_path))
    results = read_results(tmp_path / "benchmarks/results/nvidia-h100-80gb-hbm3-2026-11-27-c0ffee.json")
    assert [(found.op, found.candidate, found.median_ms) for found in results.rows] == [
        ("layer_norm", "evakernels cuda", 1.0),
        ("layer_norm", "torch eager", 5.0),
        ("swiglu", "evakernels cuda", 1.0),
        ("swiglu", "torch eager", 5.0),
    ]
    assert results.machine.notes == ["throttled"]
    assert results.machine.command == "make gpu-check"
    assert results.absent == {"swiglu: apex": "no", "layer_norm: apex": "no"}
    page = (tmp_path / "docs/gpu-check.md").read_text()
    assert f"**{CARD}, driver 580.1, torch 2.11.0, commit c0ffee**." in page
    assert "| first_light | 1 | 0 | 0 | 0 |" in page  # the last journal's word
    assert "| EVA02-CLIP-B-16 b512 | 250.0 | 2,048 | 41.0% | 32.0 | 16.0 |" in page
    assert "| gelu on cuda | `gelu_forward<8>` | 12.5 | – | – | – | – | 64 |" in page  # noqa: RUF001
    assert "| `swiglu` | eva02-b16@224 b8 | float32 |" in page
    assert "A prediction, of instructions" in page
    assert "| swiglu | 1.000 | 0.500 | 2.00 | DRAM | h100-80g |" in page
    assert "| all 1: median; worst |  |  | 2.00; 2.00 |  |  |" in page
    assert "old" not in page
    assert {path.name for path in written} == {results.file_name, "gpu-check.md", "index.html"}
    assert (tmp_path / "docs/gpu-roofline.png").is_file()


def test_the_summary_has_predictions_beside_what_was_measured(tmp_path: Path) -> None:
    journal, console = journal_in(tmp_path), Console(record=True, width=200)
    timed(journal, 1.0)
    found = summary.summarize(journal.read(), [], {})
    summary.show(found, console)
    summary.write(found, journal.path)
    assert "all 1: median; worst" in console.export_text()
    assert "| swiglu | 1.000 | 0.500 | 2.00 | DRAM | h100-80g |" in journal.path.with_suffix(".summary.md").read_text()


@pytest.mark.exhaustive  # the search imports Triton
def test_configurations_that_were_found_are_written_beside_the_others(tmp_path: Path) -> None:
    journal, root = journal_in(tmp_path), repository_in(tmp_path)
    shipped = tuning.table(CARD, 90)["layer_norm_forward"]
    found = {"shape": shipped[0]["shape"], "config": shipped[0]["config"] | {"num_warps": 1}}
    case = "width=1"
    end(journal, "tuning", "layer_norm_forward", case, gpu=CARD, capability=90, entry=found)
    (path,) = [path for path in merge([journal.path], root=root) if path.suffix == ".json"]
    assert path.name == "nvidia_h100_80gb_hbm3.json"
    entries = tuning.read(path)["layer_norm_forward"]
    assert entries == [found, *shipped[1:]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rehearsal": True}, r"b\.jsonl is a rehearsal"),
        ({"commit": "beef"}, "more than one commit: c0ffee, beef; --mixed merges them anyway"),
        ({"card": "NVIDIA H200"}, "more than one card: NVIDIA H100 80GB HBM3, NVIDIA H200"),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    paths = [journal_in(tmp_path, "a").path, journal_in(tmp_path, "b", **changes).path]
    with pytest.raises(UserError, match=message):
        merge(paths, root=repository_in(tmp_path))
    assert (tmp_path / "docs/gpu-check.md").read_text() == PAGE
    if "rehearsal" not in changes:
        merge(paths, mixed=True, root=repository_in(tmp_path))
