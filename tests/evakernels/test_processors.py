"""Tests whose result depends on the processor, once for each kind of processor between which evakernels chooses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evakernels
from evakernels import _native
from evakernels.nn.linear import faster_dtypes, matmul_dtypes

TESTS = Path(__file__).parents[1]
# By kind, the instruction set of its kernels.
KINDS = {"avx2": "avx2", "avx512": "avx512", "amx": "amx", "amd": "avx512_bf16"}
ISAS = evakernels.info()["native"].get("isas_available", [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != _native.processor()])
def test_other_processor(kind: str) -> None:
    files = [path for path in TESTS.rglob("test_*.py") if "mark.by_processor" in path.read_text(encoding="utf-8")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"EVAKERNELS_PROCESSOR": kind}
    if KINDS[kind] in ISAS:
        environment["EVAKERNELS_ISA"] = KINDS[kind]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "by_processor and not exhaustive"]
    result = subprocess.run(
        [*command, *files], cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]


@pytest.mark.by_processor
def test_processor_chooses_linear() -> None:
    assert (torch.float32 in faster_dtypes()) == (_native.processor() == "amd" and bool(matmul_dtypes()))
    if _native.processor() == "avx2":
        assert torch.bfloat16 not in matmul_dtypes()


def test_processor_of_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVAKERNELS_PROCESSOR", "z80")
    with pytest.raises(ValueError, match=r"EVAKERNELS_PROCESSOR must be one of .*, got 'z80'"):
        _native.processor.__wrapped__()
