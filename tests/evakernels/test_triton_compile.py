"""Every shipped configuration of the Triton kernels compiles for its GPUs, spills no register and can be launched."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("triton_compile.py")

SHARED_MEMORY = {80: 163, 90: 227, 100: 227, 120: 99}
"""What a block may take, in KiB, by compute capability (CUDA C++ Programming Guide, technical specifications)."""

HALVES = (("90",), ("80", "100", "120"))
"""What is compiled at the same time: the first in two dtypes, the others in one."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (it exists for Linux only)"),
]


@pytest.fixture(scope="module")
def usages() -> list[dict[str, Any]]:
    # Kernels can't be compiled in a process that interprets them.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[2])
    processes = [
        subprocess.Popen([sys.executable, SCRIPT, *half], env=environment, stdout=subprocess.PIPE, text=True)
        for half in HALVES
    ]
    found = []
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0, "see the traceback on stderr"
        found += json.loads(output)
    return found


def test_every_configuration_compiles_for_every_gpu(usages: list[dict[str, Any]]) -> None:
    from evakernels import tuning

    for capability in SHARED_MEMORY:
        compiled = {(u["op"], *u["shape"].items()) for u in usages if u["capability"] == capability}
        entries = {(op, *e["shape"].items()) for op, found in tuning.table("", capability).items() for e in found}
        assert compiled == entries


def test_no_register_is_spilled(usages: list[dict[str, Any]]) -> None:
    assert [str(u) for u in usages if u["stack"] > 0] == []


def test_a_block_fits_into_shared_memory(usages: list[dict[str, Any]]) -> None:
    assert [str(u) for u in usages if u["shared"] > 1024 * SHARED_MEMORY[u["capability"]]] == []


def test_all_programs_that_walk_over_rows_run_at_a_time(usages: list[dict[str, Any]]) -> None:
    """`persistent_programs` counts on that many registers."""
    families = ("layer_norm", "swiglu")
    walking = [u for u in usages if u["op"].endswith("backward") and any(family in u["op"] for family in families)]
    assert [str(u) for u in walking if u["registers"] > 128] == []
