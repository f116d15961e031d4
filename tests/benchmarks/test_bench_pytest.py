"""The cases as pytest-benchmark sees them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CASE = "layer_norm-forward-eva02-b16@224 b1-float32"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="its shape is one of those for processors")
@pytest.mark.exhaustive
def test_case_is_measured_by_pytest_benchmark(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    names = "layer_norm and not layer_norm_add and not add_layer_norm and forward and b16 and b1- and float32 and eager"
    quick = ("--benchmark-only", "--benchmark-max-time=0.01", "--benchmark-min-rounds=3", f"--benchmark-json={report}")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", "-k", names, *quick]
    # Among other tests pytest-benchmark would measure nothing.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(report.read_text())["benchmarks"]
    assert found["name"] == f"test_op[{CASE}-torch eager]"
    assert found["group"] == CASE
    assert found["stats"]["rounds"] >= 3
