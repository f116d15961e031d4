"""`--device` and `--backend` of the op tests, on a small test file and on the meta device."""

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
import pytest, torch
from torch import nn
import evakernels

MADE = [torch.ones(3), torch.tensor([1.0]), torch.randn(2, generator=torch.Generator().manual_seed(0))]
FLOAT64 = torch.ones(2, 4).double()

def test_what_a_test_makes_is_moved():
    made = [*MADE, torch.arange(3), torch.zeros(2, requires_grad=True), torch.cat(MADE)]
    assert {t.device.type for t in made} == {"meta"}
    assert made[4].requires_grad and made[4].is_leaf

def test_a_device_that_is_given_holds():
    assert torch.ones(1, device="cpu").is_cpu

def test_what_others_make_stays():
    assert nn.Linear(2, 2).weight.is_cpu

@pytest.mark.cpu_only("it counts threads")
def test_of_the_cpu():
    assert MADE[0].is_cpu

def test_served():
    assert evakernels.layer_norm(FLOAT64.float()).shape == (2, 4)

def test_refused():
    evakernels.layer_norm(FLOAT64)

def test_another_backend_is_no_refusal():
    with evakernels.use_backend("triton"):
        evakernels.layer_norm(FLOAT64)
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(FOLDER.parents[1]), "COLUMNS": "300"}  # room for the errors


def outcomes(folder: Path, *options: str) -> dict[str, str]:
    """Outcome by test, and pytest's output under ""."""
    call = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *options]
    text = subprocess.run(call, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False).stdout
    return {"": text} | {name: word for word, name in re.findall(r"^(PASSED|FAILED) \S+::(test_\w+)", text, re.M)}


@pytest.fixture
def tests(tmp_path: Path) -> Path:
    for name in ("conftest.py", "on_device.py"):
        shutil.copy(FOLDER / name, tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    (tmp_path / "test_tiny.py").write_text(TESTS)
    return tmp_path


@pytest.mark.exhaustive
def test_factories_use_the_device(tests: Path) -> None:
    found = outcomes(tests, "--device", "meta", "-k", "not refus")
    moved = ("what_a_test_makes_is_moved", "a_device_that_is_given_holds", "what_others_make_stays", "served")
    assert {name for name, word in found.items() if word == "PASSED"} == {f"test_{name}" for name in moved}, found[""]
    assert "of the CPU: it counts threads" in found[""]


@pytest.mark.skipif(not _native.LOADED, reason="the native library is not built")
def test_refused_calls_are_skipped(tests: Path) -> None:
    found = outcomes(tests, "--backend", "cpu", "-k", "served or refus or of_the_cpu")
    assert found["test_served"] == found["test_of_the_cpu"] == "PASSED", found[""]
    assert "test_refused" not in found
    assert found["test_another_backend_is_no_refusal"] == "FAILED"
    assert "float64 is not one of" in found[""]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_no_op_test_mixes_devices() -> None:
    """On the meta device every comparison fails, but no op reports tensors of two devices."""
    ops = {"contrastive", "gelu", "layer_norm", "packed_attention", "rope_attention", "swiglu"}
    choice = "(accurate or error_rule) and not dtype0 and not dtype2"
    text = outcomes(FOLDER, *(f"test_{op}.py" for op in ops), "--device", "meta", "--tb", "line", "-k", choice)[""]
    assert set(re.findall(r"^FAILED test_(\w+)\.py.*meta tensor", text, re.M)) == ops
    assert not re.findall(r"^(?:E|/).*(?:on cpu|device cpu|cpu and meta|meta and cpu|cpu, meta).*", text, re.M)
