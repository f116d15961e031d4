"""The stages of gpu-check that look for wrong results: without a GPU, on programs and tests that play their parts."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check.records import SCHEMA, Journal
from benchmarks.gpu_check.stage import Failure, Session, Settings, Unit
from benchmarks.gpu_check.stages import hunters, truth
from evakernels.triton import FAMILIES

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests/evakernels"))
from op_suite import OPS  # noqa: E402

Records = dict[str, dict[str, Any]]


def session_of(unit: Unit, settings: Settings, folder: Path) -> Session:
    journal = Journal(folder / "journal.jsonl")
    journal.append("header", schema=SCHEMA)
    return Session(unit, settings, journal, time.monotonic() + 60)


def ended(journal: Path) -> Records:
    """The last record of each case that ended."""
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    return {f"{r['unit']}: {r['case']}": r for r in records if r["record"] in ("end", "died")}


# --- truth ----------------------------------------------------------------------------------------------------------


def test_every_op_test_is_run_on_every_backend_that_has_kernels() -> None:
    units = [unit.name for unit in truth.units(Settings())]
    assert len(set(units)) == len(units)
    # A GPU has no kernels of the latter.
    assert set(OPS) <= {*truth.FILES, "row_quantization"}
    for file in truth.FILES:
        assert (ROOT / f"tests/evakernels/test_{file}.py").exists(), file
    assert {f"{family} triton" for family in FAMILIES} <= set(units)
    cuda_ops = [path.stem for path in (ROOT / "csrc/bind").glob("*.cpp") if "\nEVAKERNELS_OPS(" in path.read_text()]
    assert {f"{op} cuda" for op in (*cuda_ops, "packed_attention")} <= set(units)


CONFTEST = """
def pytest_addoption(parser):
    parser.addoption("--device")
    parser.addoption("--backend")
"""
TINY = """
import os, pytest

def test_fine(): pass
def test_opcheck_last(): pass
def test_wrong(): assert 1 == 2, "error 0.5"
@pytest.mark.skip(reason="needs another GPU")
def test_refused(): pass
def test_dies(): os.abort()
"""
RUN = """
import sys
from pathlib import Path
from benchmarks.gpu_check import stage
from benchmarks.gpu_check.records import Journal
from benchmarks.gpu_check.stages import truth
truth.ROOT, truth.FILES, truth._serve = Path(sys.argv[1]), {"tiny": ("", ("cuda",))}, lambda op, backend: None
unit = stage.Unit("truth", "tiny cuda")
session = stage.Session(unit, stage.Settings("cpu"), Journal(Path(sys.argv[1]) / "journal.jsonl"), 1e12)
truth.run(unit, session)
"""


@pytest.mark.exhaustive
def test_tests_are_cases_and_what_kills_the_process_is_left_out_next_time(tmp_path: Path) -> None:
    tests = tmp_path / "tests/evakernels"
    tests.mkdir(parents=True)
    (tests / "conftest.py").write_text(CONFTEST)
    (tests / "test_tiny.py").write_text(TINY)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("header", schema=SCHEMA)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def run() -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-c", RUN, str(tmp_path)]
        return subprocess.run(call, env=environment, capture_output=True, text=True, check=False)

    assert run().returncode == -6
    begun = [r["case"] for r in journal.read() if r["record"] == "begin"]
    assert begun[-1] == "test_dies"
    journal.append("died", stage="truth", unit="tiny cuda", case="test_dies")  # as the supervisor does
    second = run()
    assert second.returncode == 0, second.stdout + second.stderr
    found = ended(journal.path)
    assert {name.partition(": ")[2]: r.get("status") for name, r in found.items()} == {
        "the backend serves the op": "passed",
        "test_fine": "passed",
        "test_wrong": "failed",
        "test_refused": "refused",
        "test_dies": None,
        "test_opcheck_last": "passed",
    }
    assert "error 0.5" in found["tiny cuda: test_wrong"]["error"]
    assert "test_tiny.py:6" in found["tiny cuda: test_wrong"]["error"]
    assert found["tiny cuda: test_refused"]["error"] == "Skipped: needs another GPU"
    (tests / "test_tiny.py").write_text("import nothing_of_this_name\n")
    assert "ExitCode" in run().stderr


# --- hunters --------------------------------------------------------------------------------------------------------

SANITIZER = """#!/bin/sh
[ "$1 $3 $5" = "--tool --error-exitcode --print-limit" ] || exit 3
tool=$2; code=$4; shift 6
"$@" || exit $?
case "$2" in
  gelu) echo "========= Invalid __global__ read of size 16 bytes"; echo "========= ERROR SUMMARY: 1 error"; exit $code;;
  rope_attention) exit 0;;
esac
echo "========= ERROR SUMMARY: 0 errors of $tool"
"""
DRIVER = """#!/bin/sh
case "$1" in
  swiglu) echo "wrong: out of 29 rows of 64, dtype 0: error nan"; exit 1;;
  lamb) kill -SEGV $$;;
  norms) sleep 60;;
esac
echo "all right"
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with a driver, and a compute-sanitizer on PATH, that are scripts."""
    for path, text in (("hunters/drive_gpu", DRIVER), ("bin/compute-sanitizer", SANITIZER)):
        file = tmp_path / path
        file.parent.mkdir()
        file.write_text(text)
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(hunters, "_CUDA", "")
    monkeypatch.setattr(hunters, "_BUILT", tmp_path / "built")
    return tmp_path


def hunted(folder: Path, tool: str, *families: str) -> Records:
    """The records of the families."""
    unit = Unit("hunters", tool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hunters, "FAMILIES", families)
        hunters.run(unit, session_of(unit, Settings("cpu", bundle=str(folder)), folder))
    return {name.partition(": ")[2]: record for name, record in ended(folder / "journal.jsonl").items()}


@pytest.mark.parametrize(
    ("family", "tool", "status", "error"),
    [
        ("token_dropout", "plain", "passed", ""),
        ("token_dropout", "racecheck", "passed", ""),
        ("gelu", "memcheck", "failed", "Invalid __global__ read of size 16 bytes (exit status 42)"),
        ("swiglu", "plain", "failed", "wrong: out of 29 rows of 64, dtype 0: error nan (exit status 1)"),
        ("swiglu", "memcheck", "failed", "wrong: out of 29 rows of 64, dtype 0: error nan (exit status 1)"),
        ("lamb", "plain", "failed", "died of signal 11"),
        ("rope_attention", "memcheck", "failed", "all right (exit status 0)"),  # no summary: it didn't look
    ],
)
def test_each_complaint_is_recorded(programs: Path, family: str, tool: str, status: str, error: str) -> None:
    record = hunted(programs, tool, family)[family]
    assert (record["status"], record["error"]) == (status, error)
    if status == "passed" and tool != "plain":
        assert record["data"]["summary"] == f"0 errors of {tool}"


def test_a_program_that_hangs_is_ended_and_the_others_run(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hunters, "_LIMIT", 5.5)
    found = hunted(programs, "plain", "norms", "gelu")
    assert found["norms"]["error"] == "no end after 0.5 s"
    assert found["gelu"]["status"] == "passed"


def test_what_is_not_there_is_refused(programs: Path) -> None:
    (programs / "bin/compute-sanitizer").unlink()
    assert "no compute-sanitizer" in hunted(programs, "memcheck", "gelu")["gelu"]["error"]
    (programs / "hunters/drive_gpu").unlink()
    assert hunted(programs, "plain", "gelu")["gelu"]["status"] == "refused"


def test_without_a_program_in_the_bundle_it_is_compiled_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hunters, "_BUILT", tmp_path / "built")
    names = [unit.name for unit in hunters.units(Settings())]
    assert names == ["compile", *hunters.TOOLS]
    driver = (ROOT / "tests/cuda/drive.cpp").read_text()
    assert all(f'wanted("{family}")' in driver for family in hunters.FAMILIES)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\n[ -z "$BROKEN" ] || { echo "error: no such GPU"; exit 1; }\n'
                    'for word; do last=$word; done\necho "$@" > $last\n')  # fmt: skip
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(Failure, match="no such GPU"):
        hunters.compile_program(tmp_path / "built", "sm_90")
    monkeypatch.delenv("BROKEN")
    hunters.compile_program(tmp_path / "built", "sm_90")
    linked = (tmp_path / "built" / hunters.PROGRAM).read_text()
    assert all(f"{name}.o" in linked for name in ("swiglu_product.cu", "lamb.cu", "drive_lamb.cpp", "gpu_memory.cpp"))
    assert [unit.name for unit in hunters.units(Settings())] == names[1:]
