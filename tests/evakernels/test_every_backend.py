"""The ops' accuracy on every instruction set and on the references: those that the other tests don't run on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import evakernels

NATIVE = evakernels.info()["native"]
OTHER_ISAS = [isa for isa in NATIVE.get("isas_available", []) if isa != NATIVE["isa"]]
OPS = ("contrastive", "lamb", "layer_norm", "rope_attention", "swiglu", "token_dropout")
FILES = [f"test_{op}.py" for op in OPS]
CHOICE = "accurate or odd_shapes or formula or error_rule"
RUN = "import pytest, sys; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', {choice!r}, *{files!r}]))"


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE["loaded"], reason=f"there are no compiled kernels: {NATIVE['reason']}")
@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_instruction_set(isa: str) -> None:
    run(RUN.format(choice=CHOICE, files=FILES), EVAKERNELS_ISA=isa)


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE["loaded"], reason="the other tests run on the references already")
def test_reference() -> None:
    # One test is of the kernels' own tiles.
    chosen = RUN.format(choice=f"({CHOICE}) and not several_tiles", files=FILES)
    run(f"import evakernels\nwith evakernels.use_backend('reference'):\n    {chosen}")


def run(code: str, **environment: str) -> None:
    """Runs the chosen tests of all ops in a process of their own: the instruction set is chosen once for each."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
