"""`make gpu-check` without a GPU: its tests run nvcc's and Triton's kernels in the interpreter."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from op_suite import ROOT
from ptx_build import BUILD, budget

pytestmark = [pytest.mark.exhaustive, pytest.mark.slow, pytest.mark.skipif(budget.nvcc() is None, reason="no nvcc")]
LEFT_OUT = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")


@pytest.fixture
def tree(made_once, tmp_path):
    """A copy of the tree with a library in which the kernels that nvcc compiled serve the CPU."""
    made_once("ptx", lambda folder: budget.build("ptx"))
    for name in ("evakernels", "evaclip", "benchmarks", "csrc", "ptx_interpreter", "tests/evakernels"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=LEFT_OUT)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / "tree")
    shutil.copy(BUILD / "ptx/_ops.so", tmp_path / "tree/evakernels")
    return tmp_path / "tree"


def rehearse(tree, only, tests):
    """Exit status, results by step, and output; `tests` is pytest's -k."""
    options = f"-p interpreted_gpu -n 1 -k '{tests}'"
    folders = os.pathsep.join([str(tree), str(tree / "tests/evakernels")])
    environment = os.environ | {"PYTHONPATH": folders, "PYTEST_ADDOPTS": options, "OMP_NUM_THREADS": "1"}
    out = tree.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--out", out, "--budget", "3000"]
    done = subprocess.run(
        [*command, "--only", only], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines() if line]
    logs = "".join(path.read_text() for path in out.glob("*.log"))
    return done.returncode, {result["step"]: result for result in results}, done.stdout + done.stderr + logs


def test_first_light_on_interpreted_kernels(tree):
    status, results, output = rehearse(tree, "first light", "swiglu or gelu or token_dropout")
    assert status == 0, output
    assert re.match(r"=* ?\d+ passed in", results["first light"]["summary"]), output


def test_wrong_kernel_is_a_failure(tree):
    path = tree / "evakernels/_ops.so"
    entry = re.compile(rb"\.entry [^(]*gelu_forward[^(]*\(.*?\n\}", re.DOTALL)
    path.write_bytes(entry.sub(lambda found: found[0].replace(b"\nret;\n", b"\ntrap;"), path.read_bytes()))
    status, results, output = rehearse(tree, "first light", "gelu")
    assert status == 1, output
    assert ["gelu_forward" in failure for failure in results["first light"]["failures"]] == [True], output


# A hanging test ends its process, too.
CRASH = pytest.param("import os; os.kill(os.getpid(), 11)", marks=pytest.mark.weekly)


@pytest.mark.parametrize("planted", [CRASH, "import time; time.sleep(99)"])
def test_crash_or_hang_costs_one_test(tree, planted):
    with (tree / "tests/evakernels/test_first_light.py").open("a") as file:
        file.write(f"\n\ndef test_planted_gelu():\n    {planted}\n")
    status, results, output = rehearse(tree, "first light", "gelu")
    assert status == 1, output
    assert "1 failed, 2 passed" in results["first light"]["summary"], output
