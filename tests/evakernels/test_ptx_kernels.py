"""GPU kernels as compiled by nvcc and Triton: ptx_interpreter runs their PTX on the CPU, under the ops' own tests.

Races, uninitialised reads, accesses out of bounds or misaligned, copies without a wait and uneven barriers fail the op.
tests/cuda/drive.py runs on them as well, also with planted faults, which must be reported.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp

import pytest
from op_suite import GPU_OPS, ROOT, copy_with_library, run_ops
from planted_faults import FAULTS, NUMBERS, REPEATED, REQUESTED, family_of, units
from ptx_build import BUILD, budget, build_planted, gxx

from evakernels.triton import FAMILIES
from ptx_interpreter import Module
from ptx_interpreter.gpus import GPUS
from ptx_interpreter.memory import build_allocations
from ptx_interpreter.runtime import newest_for, ptx_in

OPS = {
    "norms": ("layer_norm",),
    "widths": ("norm_widths",),
    "attention": ("packed_attention", "rope_attention"),
    "losses": ("contrastive",),
    "elements": ("gelu", "swiglu", "token_dropout"),
}
"""Test files by process, which parses the kernels that they share once."""
CHECKED = {80: "nvcc", 100: "nvcc=float32,bfloat16,float64"}
"""Tests by compute capability of the PTX; float16 only on the older one."""
SHARED_KB = {80: 163, 100: 227}
"""Shared memory per block by compute capability, which attention plans for."""
weekly = pytest.mark.weekly
# Only norms have code of their own for 10.0, and norm_widths nothing that the other tests of norms lack.
AGAIN = [pytest.param(100, ops, marks=[] if ops == "norms" else weekly) for ops in OPS if ops != "widths"]
"""Ops that also run on the newer PTX, which another compiler generates."""
FILES = {
    "layer_norm": ("layer_norm", "norm_widths"),
    "adamw": ("adamw", "native_optimizers", "optimizers", "stochastic_rounding"),
}
"""Test files of families with other files than their own."""
# Tests on Triton's PTX by compute capability; on the older one few optimizer tests, and of other ops only bfloat16.
EDGES = ("triton bfloat16=bfloat16", "triton edges=float32,bfloat16,float16")
TRITON = {80: ("triton=bfloat16", *EDGES), 90: ("triton", *EDGES)}
OPTIMIZERS = {80: ("triton",), 90: ("triton", "newest triton")}
LEAST_COVERAGE = 0.95
PLUGIN = ("-p", "interpreted_gpu")

pytestmark = [pytest.mark.exhaustive, pytest.mark.slow, pytest.mark.skipif(gxx() is None, reason="no g++")]
needs_nvcc = pytest.mark.skipif(budget.nvcc() is None, reason="no nvcc")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def built(made_once: Callable[..., Path]) -> Path:
    """Folder of the library and the Python module."""
    made_once("ptx", lambda folder: budget.build("ptx"))
    return BUILD / "ptx"


def paths(*folders: Path) -> str:
    return os.pathsep.join(map(str, [*folders, ROOT]))


def run_nvcc(
    folder: Path, built: Path, kernels: Sequence[str], ops: Sequence[str], capability: int, **environment: object
) -> None:
    """Runs the ops' tests on nvcc's kernels, in a copy of the package in `folder`."""
    tests = copy_with_library(folder, built / "_ops.so", *built.glob("_C*.so"))
    variables = {"PTX_COMPILER": "nvcc", "PTX_CAPABILITY": capability, **environment}
    text = {name: str(value) for name, value in variables.items()}
    run_ops(kernels, tests, ops, PLUGIN, PYTHONPATH=paths(tests.parent), **text)


@pytest.fixture(scope="module")
def lines_run(built: Path, made_once: Callable[..., Path]) -> Callable[[int, str], Path]:
    """`lines_run(capability, name)` runs the tests of OPS[name] and returns the file of executed lines."""

    def run(folder: Path, capability: int, ops: str) -> None:
        folder.mkdir(exist_ok=True)  # after a failure
        copy, options = Path(mkdtemp(dir=folder)), {"PTX_LINES": folder / "lines"}
        shared = SHARED_KB[capability]
        run_nvcc(copy, built, [CHECKED[capability]], OPS[ops], capability, PTX_SHARED_KB=shared, **options)

    def lines(capability: int, ops: str) -> Path:
        return made_once(f"ptx-{capability}-{ops}", lambda folder: run(folder, capability, ops)) / "lines"

    return lines


@needs_nvcc
@pytest.mark.parametrize(("capability", "ops"), [(80, ops) for ops in OPS] + AGAIN)
def test_ops(lines_run: Callable[[int, str], Path], capability: int, ops: str) -> None:
    assert lines_run(capability, ops).exists()


@needs_nvcc
def test_ops_cover_device_code(built: Path, lines_run: Callable[[int, str], Path]) -> None:
    counts = [count for ops in OPS for count in json.loads(lines_run(80, ops).read_text())]
    runs = {(file, line) for file, line, count in counts if count}
    lines: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for texts in ptx_in((built / "_ops.so").read_bytes()):
        for file, line in Module(newest_for(texts, 80)).lines():
            if Path(file).parent == ROOT / "csrc/cuda":
                lines[Path(file).name].add((file, line))
    shares = {name: len(own & runs) / len(own) for name, own in lines.items()}
    report = "\n".join(f"{share:.0%} {name}" for name, share in sorted(shares.items()))
    print(report)
    assert len(shares) >= 20, report
    # One line of a small header is more than that share.
    missed = {name: len(own - runs) for name, own in lines.items() if len(own - runs) > 1}
    assert all(count <= (1 - LEAST_COVERAGE) * len(lines[name]) for name, count in missed.items()), report


@needs_nvcc
def test_raw_launchers_on_interpreted_kernels(built: Path, tmp_path: Path) -> None:
    run_nvcc(tmp_path, built, (), ["native_launchers"], 80)


@needs_nvcc
@pytest.mark.parametrize("gpu", ["small gpu", "h100", *(pytest.param(gpu, marks=weekly) for gpu in ("a100", "b200"))])
def test_plans_of_gpu(built: Path, tmp_path: Path, gpu: str) -> None:
    """On the small GPU of ptx_interpreter/host/cudart.cpp, which has 99 KB of shared memory."""
    options = {"PTX_GPU": gpu} if gpu in GPUS else {}
    capability = GPUS[gpu].capability if gpu in GPUS else 80
    run_nvcc(tmp_path, built, [gpu], ["gpu_launches"], capability, **options)


# --- the launchers on buffers without spare memory ------------------------------------------------------------------


@pytest.fixture
def complaint(built: Path, made_once: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """The error output of tests/cuda/drive.py on a library; "" on success."""
    allocations = made_once("allocations", build_allocations) / "allocations.so"

    def run(library: Path, capability: int, *families: str, **environment: str) -> str:
        tests = copy_with_library(tmp_path, library, *built.glob("_C*.so"))
        command = [sys.executable, ROOT / "tests/cuda/drive.py", "--interpret", str(capability), *families]
        variables = os.environ | {"PYTHONPATH": paths(tests.parent), "LD_PRELOAD": str(allocations)} | environment
        result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600, check=False)
        return "" if result.returncode == 0 else f"exit code {result.returncode}: {result.stdout}{result.stderr}"

    return run


@needs_nvcc
@pytest.mark.parametrize("capability", [80, pytest.param(100, marks=weekly)])
def test_launchers_pass(built: Path, complaint: Callable[..., str], capability: int) -> None:
    assert complaint(built / "_ops.so", capability, *GPU_OPS) == ""


@pytest.fixture(scope="module")
def planted(built: Path, made_once: Callable[..., Path]) -> Path:
    """The library with all faults."""
    return made_once("ptx-planted", build_planted) / "_ops.so"


@needs_nvcc
@pytest.mark.xdist_group("planted ptx")
@pytest.mark.parametrize("name", [pytest.param(name, marks=weekly) if name in REPEATED else name for name in FAULTS])
def test_planted_fault_is_reported(planted: Path, complaint: Callable[..., str], name: str) -> None:
    report = complaint(planted, 80, family_of(units()[name]), **{REQUESTED: str(NUMBERS[name])})
    assert FAULTS[name].report in report, report


# --- Triton --------------------------------------------------------------------------------------------------------


def run_triton(kernels: Sequence[str], ops: Sequence[str], capability: int, *options: str) -> None:
    environment = {"PYTHONPATH": paths(), "PTX_COMPILER": "triton", "PTX_CAPABILITY": str(capability)}
    run_ops(kernels, ops=ops, options=(*PLUGIN, *options), **environment)


@needs_triton
# The losses show the matmuls of 8.0; test_bench_triton_audit.py runs all kernels on it.
@pytest.mark.parametrize(
    ("capability", "family"),
    [pytest.param(80, family, marks=[] if family == "contrastive" else weekly) for family in FAMILIES]
    + [(90, family) for family in FAMILIES],
)
def test_triton_ops(capability: int, family: str) -> None:
    if family in ("adamw", "lamb"):
        # These tests select the backend themselves and skip calls that it refuses.
        run_triton(OPTIMIZERS[capability], FILES.get(family, [family]), capability, "--backend", "triton")
    else:
        run_triton(TRITON[capability], FILES.get(family, [family]), capability)


@needs_triton
def test_triton_launches() -> None:
    run_triton(["triton launches"], ["gpu_launches"], 90)


WITHOUT_MASK = """
import torch, triton
from triton import language as tl

@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, 2 * tl.load(x + i{mask}), i < n)

def test_double():
    x = torch.ones(100)
    y = torch.empty_like(x)
    double[(1,)](x, y, 100, BLOCK=128)
    assert (y == 2).all()
"""


@needs_triton
@pytest.mark.parametrize("mask", ["", ", i < n"])
def test_interpreted_gpu_plugin_knows_bounds(tmp_path: Path, mask: str) -> None:
    """The command of CONTRIBUTING.md for Triton kernels."""
    (tmp_path / "test_double.py").write_text(WITHOUT_MASK.format(mask=mask))
    paths = os.pathsep.join([str(ROOT / "tests/evakernels"), str(ROOT)])
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "interpreted_gpu", "test_double.py"]
    environment = os.environ | {"PYTHONPATH": paths}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == (not mask), result.stdout + result.stderr
    # How many of the 28 accesses are found depends on what the heap has behind the tensor.
    assert ("out of bounds" in result.stdout) == (not mask), result.stdout
