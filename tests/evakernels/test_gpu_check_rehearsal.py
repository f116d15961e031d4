"""`make gpu-check` from end to end without a GPU: the kernels' PTX is run, and nothing takes it for a measurement."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from op_suite import ROOT
from ptx_build import BUILD, budget
from warm import warm

pytestmark = [pytest.mark.exhaustive, pytest.mark.slow, pytest.mark.skipif(budget.nvcc() is None, reason="no nvcc")]
RUN = "import sys; sys.executable = sys.argv.pop(1); from benchmarks.gpu_check.cli import main; sys.exit(main())"
LEFT_OUT = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")


@pytest.fixture
def tree(made_once: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the tree with a library in which the kernels that nvcc compiled serve the CPU."""
    made_once("ptx", lambda folder: budget.build("ptx"))
    for name in ("evakernels", "evaclip", "benchmarks", "csrc", "ptx_interpreter", "tests/evakernels"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=LEFT_OUT)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / "tree")
    shutil.copy(BUILD / "ptx/_ops.so", tmp_path / "tree/evakernels")
    return tmp_path / "tree"


def leave_one_file_of_triton(tree: Path) -> None:
    """Of Triton's kernels those of layer_norm alone are looked at, as all are in the test of all stages."""
    path = tree / "benchmarks/gpu_check/stages/first_light.py"
    every = "for family in evakernels.triton.FAMILIES\n"
    assert path.read_text().count(every) == 1
    path.write_text(path.read_text().replace(every, 'for family in ("layer_norm",)\n'))


def rehearse(tree: Path, *stages: str, python: Path = Path(sys.executable)) -> tuple[int, list[dict[str, Any]], str]:
    """The exit status, the records, and what was printed. `python` runs the units."""
    out = tree.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    call = [sys.executable, "-c", RUN, python, "--rehearsal", "--out", out, "--budget", "3000"]
    changed = environment(tree)
    for stage in stages:
        call += ["--only", stage]
    result = subprocess.run(call, cwd=tree, env=changed, capture_output=True, text=True, check=False)
    (journal,) = out.glob("*.jsonl")
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    return result.returncode, records, result.stdout + result.stderr


def environment(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}


def statuses(records: list[dict[str, Any]], stage: str) -> dict[str, str]:
    return {end["case"]: end["status"] for end in records if end["record"] == "end" and end["stage"] == stage}


def test_rehearsal_passes_all_stages(tree: Path) -> None:
    with warm(Path(sys.executable), environment(tree)) as programs:  # thirty processes
        status, records, output = rehearse(tree, python=programs / "python")
    assert status == 0, output
    assert records[0]["rehearsal"]
    light = statuses(records, "first_light")
    assert light.pop("another stream") == "refused"
    assert set(light.values()) == {"passed"}
    assert {"lamb_apply on cuda", "rope_attention_backward on cuda", "siglip_backward on triton"} <= set(light)
    truth = [end for end in records if end["record"] == "end" and end["stage"] == "truth"]
    assert {(end["unit"], end["status"]) for end in truth} == {("swiglu cuda", "passed"), ("swiglu triton", "passed")}
    assert len(truth) == 18
    assert statuses(records, "hunters") == {"norms": "refused"}  # nothing is compiled in a rehearsal
    timing = statuses(records, "timing")
    assert set(timing.values()) == {"passed"}
    assert {"ceilings", "emoji b4 drop50", "layer_norm, training, 4x64, bfloat16"} <= set(timing)
    rows = [row for end in records if end["record"] == "end" for row in end["data"].get("rows", ())]
    assert any(row["candidate"] == "evakernels cpu" and row["op"] == "rope_attention" for row in rows)
    assert all(row["failure"] is None for row in rows if row["kind"] == "ours")
    journal = next((tree.parent / "out").glob("*.jsonl"))
    call = [sys.executable, "-m", "benchmarks.gpu_check", "merge", journal]
    merged = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert merged.returncode == 2
    assert "is a rehearsal" in merged.stderr


def test_rehearsal_reports_failing_kernels(tree: Path) -> None:
    leave_one_file_of_triton(tree)
    path = tree / "evakernels/_ops.so"
    library = path.read_bytes()
    entry = re.compile(rb"\.entry [^(]*gelu_forward[^(]*\(.*?\n\}", re.DOTALL)
    path.write_bytes(entry.sub(lambda found: found[0].replace(b"\nret;\n", b"\ntrap;"), library))
    status, records, output = rehearse(tree, "first_light")
    assert status == 1, output
    light = statuses(records, "first_light")
    assert light["gelu_forward on cuda"] == "failed"
    assert light["layer_norm_forward on triton"] == "passed"
    assert "gelu_forward: CUDA error: trap" in output


def test_rehearsal_without_library_fails(tree: Path) -> None:
    leave_one_file_of_triton(tree)
    (tree / "evakernels/_ops.so").unlink()
    status, records, output = rehearse(tree, "first_light")
    assert status == 1, output
    light = statuses(records, "first_light")
    assert {case for case, found in light.items() if case.endswith("on cuda")} == {
        case for case, found in light.items() if found == "failed" and case != "library"
    }
    assert "the compiled library is not loaded: not built" in output
