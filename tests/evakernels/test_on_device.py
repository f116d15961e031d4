"""`--device` and `--backend` of the op tests, on the meta device and on a small test file."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evakernels import _native

FOLDER = Path(__file__).parent
TESTS = """
import pytest, torch, evakernels

def test_served():
    assert evakernels.layer_norm(torch.ones(2, 4)).shape == (2, 4)

def test_refused():
    evakernels.layer_norm(torch.ones(2, 4).double())

def test_another_backend_is_no_refusal():
    with evakernels.use_backend("triton"):
        evakernels.layer_norm(torch.ones(2, 4).double())
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(FOLDER.parents[1]), "COLUMNS": "300"}  # room for the errors


def run_pytest(folder: Path, *options: str) -> str:
    call = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *options]
    return subprocess.run(call, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False).stdout


@pytest.mark.skipif(not _native.LOADED, reason="the native library is not built")
def test_refused_calls_are_skipped(tmp_path: Path) -> None:
    for name in ("conftest.py", "on_device.py"):
        shutil.copy(FOLDER / name, tmp_path)
    (tmp_path / "pytest.ini").touch()
    (tmp_path / "test_tiny.py").write_text(TESTS)
    text = run_pytest(tmp_path, "--backend", "cpu")
    outcomes = {name: outcome for outcome, name in re.findall(r"^(PASSED|FAILED) \S+::(test_\w+)", text, re.M)}
    assert outcomes == {"test_served": "PASSED", "test_another_backend_is_no_refusal": "FAILED"}, text
    assert "float64 is not one of" in text


@pytest.mark.exhaustive
@pytest.mark.slow
def test_no_op_test_mixes_devices() -> None:
    """On the meta device every comparison fails, but no op reports tensors of two devices."""
    ops = {"contrastive", "gelu", "layer_norm", "packed_attention", "rope_attention", "swiglu"}
    choice = "(accurate or error_rule) and not dtype0 and not dtype2"
    text = run_pytest(FOLDER, *(f"test_{op}.py" for op in ops), "--device", "meta", "--tb", "line", "-k", choice)
    assert set(re.findall(r"^FAILED test_(\w+)\.py.*meta tensor", text, re.M)) == ops
    assert not re.findall(r"^(?:E|/).*(?:on cpu|device cpu|cpu and meta|meta and cpu|cpu, meta).*", text, re.M)
