"""Every shipped configuration of the Triton kernels compiles for its GPUs, spills no register and can be launched."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from evakernels import tuning

pytestmark = pytest.mark.exhaustive

SCRIPT = Path(__file__).with_name("triton_compile.py")

SHARED_MEMORY = {80: 163, 90: 227, 100: 227, 120: 99}
"""What a block may take, in KiB, by compute capability (CUDA C++ Programming Guide, technical specifications)."""

HEAD_DIMS = {64, 80, 88, 96, 112, 128}

PERSISTENT = ("layer_norm_backward", "swiglu_backward")
"""As many of their programs run at a time as `persistent_programs` launches, if registers allow."""


OLDEST = Path(sys.prefix) / "oldest-triton"
"""The oldest Triton that is supported, beside the one that is installed: the Makefile puts it there."""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (it exists for Linux only)")
@pytest.mark.parametrize(
    ("capabilities", "version"),
    [
        ((90,), "installed"),
        ((120,), "installed"),  # it has the least shared memory
        pytest.param((80, 100), "installed", marks=pytest.mark.weekly),
        pytest.param((90,), "oldest", marks=pytest.mark.weekly),
    ],
    ids=str,
)
def test_every_configuration_compiles_and_fits(capabilities: tuple[int, ...], version: str) -> None:
    if version == "oldest" and not OLDEST.exists():
        pytest.skip("no older Triton beside the installed one (`make test` puts it there)")
    environment = dict(os.environ)
    folders = [OLDEST, SCRIPT.parents[2]] if version == "oldest" else [SCRIPT.parents[2]]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    call = [sys.executable, SCRIPT, *map(str, capabilities)]
    result = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-5000:]
    usages = json.loads(result.stdout)
    for capability in capabilities:
        compiled = {(u["op"], *u["shape"].items()) for u in usages if u["capability"] == capability}
        entries = {(op, *e["shape"].items()) for op, found in tuning.table("", capability).items() for e in found}
        assert compiled >= entries
        attention = {dict(shape)["head_dim"] for op, *shape in compiled if "attention" in op}
        assert attention == (HEAD_DIMS if capability == 90 else {64, 96})
    # As strings, of which pytest shows each in full.
    assert [str(u) for u in usages if u["stack"] > 0] == []
    assert [str(u) for u in usages if u["shared"] > 1024 * SHARED_MEMORY[u["capability"]]] == []
    assert [str(u) for u in usages if u["op"] in PERSISTENT and u["registers"] > 128] == []
