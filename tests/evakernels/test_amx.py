"""Attention on AMX: on such a processor where there is one, else its machine code on an emulator."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from op_suite import ROOT, gcc, run_ops

import evakernels

NATIVE = evakernels.info()["native"]
BUILT, AVAILABLE = NATIVE.get("isas_built", []), NATIVE.get("isas_available", [])
OPS = ("rope_attention", "packed_attention")

pytestmark = [
    pytest.mark.cpu_only("AMX is a CPU's"),
    pytest.mark.skipif("amx" not in BUILT, reason="there are no kernels for AMX"),
]


@pytest.fixture(scope="module")
def emulator(made_once: Callable[..., Path]) -> str:
    """What to load in front of Python."""
    compiler = gcc()
    if compiler is None or AVAILABLE[-1] != "avx512_bf16":
        pytest.skip("the emulator needs a g++, and a machine that has all but the tiles")

    def make(folder: Path) -> None:
        folder.mkdir()
        source = Path(__file__).with_name("amx_emulator.cpp")
        flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-mavx512f", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}"]
        subprocess.run([compiler, *flags, source, "-o", folder / "amx.so"], check=True)

    return str(made_once("amx_emulator", make) / "amx.so")


@pytest.fixture(scope="module")
def amx(request: pytest.FixtureRequest) -> dict[str, str]:
    """The environment in which the ops run on AMX."""
    if "amx" in AVAILABLE:
        return {"EVAKERNELS_ISA": "amx"}
    return {"LD_PRELOAD": request.getfixturevalue("emulator")}


def run(amx: dict[str, str], choice: str, *ops: str) -> None:
    # pytest's handler of what the machine refuses would come in front of the emulator's.
    run_ops(choice=choice, ops=ops, options=("-p", "no:faulthandler"), **amx)


@pytest.mark.slow
def test_attention_is_as_accurate_as_torch(amx: dict[str, str]) -> None:
    """Also: threads change no bit, and no head sees what another left behind."""
    sizes = "sizes_of_bfloat16 and (50 or 257)"
    run(amx, f"{sizes} or threads or leaves_others_alone or not_touched or nan_in_a_query", "rope_attention")


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("op", OPS)
def test_all_of_an_op_is_as_accurate_as_torch(amx: dict[str, str], op: str) -> None:
    run(amx, "accurate or threads or nan or touched or lse or bit_equal", op)


COUNT = """
import ctypes, torch, evakernels
names = ("configurations", "loads", "products", "stores")
loaded = ctypes.CDLL(None)
count = lambda: [ctypes.c_uint64.in_dll(loaded, f"emulated_{name}").value for name in names]
qkv = [torch.randn(1, 257, 3, 88).bfloat16().requires_grad_() for _ in range(3)]
out = evakernels.rope_attention(*qkv)
forward = count()
out.sum().backward()
print(evakernels._native.active_isa(), forward, [b - f for b, f in zip(count(), forward)])
"""


def test_number_of_products(emulator: str) -> None:
    """Each once: 257 tokens are 9 panels of 2 tiles, 17 tiles of keys or 9 of pairs, 88 channels are 6 tiles or 3."""
    environment = os.environ | {"LD_PRELOAD": emulator, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, check=True)
    heads, rows, keys, key_pairs, channels, channel_pairs = 3, 18, 17, 9, 6, 3
    scores, combined = rows * keys * channel_pairs, rows * channels * key_pairs
    name, *counts = re.findall(r"\w+", result.stdout)
    assert name == "amx"
    (configurations, loads, products, stores), backward = (list(map(int, part)) for part in (counts[:4], counts[4:]))
    assert products == heads * (scores + combined)
    # Of 2 x 2 sums four operands are loaded for four products; beside the last keys are no others.
    assert loads == products + heads * rows // 2 * channel_pairs
    assert stores == heads * rows * (keys + channels)
    assert backward[2] == heads * (2 * scores + 3 * combined)
    assert configurations == backward[0] == 1


def test_amx_is_asked_for_by_name() -> None:
    code = "from evakernels._info import info; print(info()['native'])"
    environment = os.environ | {"EVAKERNELS_ISA": "amx"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if "amx" in AVAILABLE:
        assert "'isa': 'amx'" in result.stdout
    else:
        assert f"lacks the instruction set 'amx'; available: {', '.join(AVAILABLE)}" in result.stdout


def test_tiles_are_in_the_kernels_for_amx_alone() -> None:
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("no objdump")
    library = Path(evakernels.__file__).with_name("_ops.so")
    text = subprocess.run([objdump, "-d", "-C", "--no-show-raw-insn", library], capture_output=True, text=True).stdout
    functions = re.findall(r"^\w+ <(.*)>:\n((?:.+\n)*)", text, flags=re.MULTILINE)
    found = [name for name, body in functions if re.search(r"\t(?:ldtile|sttile|tile|tdp)", body)]
    assert found
    assert all("evakernels::cpu::amx::" in name for name in found), found
