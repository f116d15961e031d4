"""The kernels for GPUs, run on the CPU by tests/cuda_emulator: the files that nvcc compiles, as the ops call them.

The ops' own tests drive a library in which these kernels serve CPU tensors, under several orders of the threads and
under sanitizers; what Python can't be run under, a program without it does. Faults that are planted show that the
checks see something.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from op_suite import CHOICE, ROOT, build_library, copy_with_library, gcc, run_ops, sanitizer_runtimes

OPS = ("layer_norm", "residual_norm", "norm_widths", "lamb", "native_lamb", "swiglu", "token_dropout")
MORE = ("every_mix", "no_rows", "one_element", "strided", "finite", "bit_equal", "lamb", "any_layout", "refuses")
CHECKS = " or ".join((CHOICE, *MORE))
OPTIMISED = "-O1 -g -fno-strict-aliasing"
SANITIZERS = {
    "none": "",
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-fsanitize=thread",
    "coverage": "--coverage -O0",
}
LEAST_COVERAGE = 0.95

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(gcc() is None, reason="no g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the fibers are written for x86-64"),
]


def options(sanitizer: str) -> dict[str, object]:
    return {
        "EVAKERNELS_EMULATED": "ON",
        "EVAKERNELS_SANITIZE": SANITIZERS[sanitizer],
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_CXX_COMPILER": gcc(),
        "CMAKE_CXX_FLAGS": OPTIMISED,
    }


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the ops' tests, with a library in which the emulated kernels serve the CPU."""
    return copy_with_library(tmp_path_factory.mktemp("emulated"), **options("none"))


# Of each of the emulator's three ways to choose the next thread.
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ops(tests: Path, seed: int) -> None:
    run_ops(choice=CHECKS, folder=tests, ops=OPS, PYTHONPATH=str(tests.parent), EVAKERNELS_EMULATOR_SEED=str(seed))


def test_the_emulated_kernels_are_what_runs(tests: Path) -> None:
    """A kernel that fails is an error with the op's name."""
    environment = {"PYTHONPATH": str(tests.parent), "EVAKERNELS_EMULATOR_BREAKDOWN": "1"}
    code = "import torch, evakernels; evakernels.layer_norm(torch.ones(2, 4))"
    call = [sys.executable, "-c", code]
    result = subprocess.run(call, cwd=tests, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert "layer_norm_forward: CUDA error: a breakdown, as asked for" in result.stderr


def test_a_wrong_index_ends_the_launch(tests: Path) -> None:
    """Of patches in either order. Ops on a CPU check it beforehand; on a GPU nobody but the kernels does."""
    code = """if True:
        import torch, evakernels
        patches, index = torch.ones(2, 6, 4), torch.tensor([[0, 1], [5, 6]])
        for view in (patches, patches.transpose(1, 2).contiguous().transpose(1, 2)):
            try:
                torch.ops.evakernels_native.token_dropout_forward(view, index, None, None)
            except RuntimeError as error:
                print(error)
    """
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tests.parent)},
        cwd=tests,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.count("token_index is out of range") == 2, result.stdout


def test_ops_are_clean_under_the_address_sanitizer(tmp_path: Path) -> None:
    watched = copy_with_library(tmp_path, **options("address"))
    run_ops(
        choice=CHECKS,
        folder=watched,
        ops=OPS,
        PYTHONPATH=str(watched.parent),
        LD_PRELOAD=" ".join(sanitizer_runtimes(str(gcc()))),
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0",
    )


def line_coverage(build: Path) -> dict[Path, float]:
    """The share of the lines of each file of device code that were run."""
    runs: dict[Path, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for counts in build.glob("CMakeFiles/emulated_kernels.dir/csrc/cuda/*.gcda"):
        report = subprocess.run(["gcov", "--json-format", "--stdout", counts], capture_output=True, check=True).stdout
        for file in json.loads(report)["files"]:
            path = (build / file["file"]).resolve()
            if path.parent.name == "cuda":
                for line in file["lines"]:
                    runs[path][line["line_number"]] += line["count"]
    return {path: sum(count > 0 for count in lines.values()) / len(lines) for path, lines in runs.items()}


def test_the_ops_tests_run_nearly_every_line_of_device_code(tmp_path: Path) -> None:
    copy = copy_with_library(tmp_path, **options("coverage"))
    run_ops(choice=CHECKS, folder=copy, ops=OPS, PYTHONPATH=str(copy.parent))
    coverage = line_coverage(tmp_path / "build")
    report = "\n".join(f"{share:.0%} {path.name}" for path, share in sorted(coverage.items()))
    print(report)
    assert len(coverage) >= 8, report
    assert min(coverage.values()) >= LEAST_COVERAGE, report


class Driver:
    """The program that runs the kernels without Python, built from a copy of the sources that may be changed."""

    def __init__(self, folder: Path, sanitizer: str) -> None:
        self.source, self.build, self.sanitizer = folder / "source", folder / "build", sanitizer
        for name in ("csrc", "tests/cuda_emulator"):
            shutil.copytree(ROOT / name, self.source / name)
        shutil.copy(ROOT / "CMakeLists.txt", self.source)

    def complaint(self, seed: int = 1) -> str:
        """What the program or the sanitizer says; nothing if all is right."""
        build_library(self.build, "drive", self.source, **options(self.sanitizer))
        # The thread sanitizer of older compilers can't run where addresses are drawn at random.
        command = [*(["setarch", "-R"] if shutil.which("setarch") else []), self.build / "drive"]
        environment = os.environ | {
            "EVAKERNELS_EMULATOR_SEED": str(seed),
            "TSAN_OPTIONS": "atexit_sleep_ms=0 halt_on_error=1",
            # Its copies of stack frames would be made and thrown away with every fiber.
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        }
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        return "" if result.returncode == 0 else f"exit code {result.returncode}: {result.stdout}{result.stderr}"

    def planted(self, file: str, right: str, wrong: str, seed: int = 1) -> str:
        """The complaint while `right`, which stands once in the file, is replaced by `wrong`."""
        path = self.source / "csrc/cuda" / file
        text = path.read_text()
        assert text.count(right) == 1, (file, right)
        path.write_text(text.replace(right, wrong))
        try:
            return self.complaint(seed)
        finally:
            path.write_text(text)


@pytest.fixture(scope="module")
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Driver:
    return Driver(tmp_path_factory.mktemp("driver"), request.param)


LAST_SUM = "    __syncthreads();\n    const int warps"
FAULTS = {
    # name: the sanitizer that sees it, what is said, the file, what is right there and what is planted
    "barrier": ("thread", "data race", "norm_rows.cuh", LAST_SUM, LAST_SUM.replace("__syncthreads();", "")),
    "reuse": ("thread", "data race", "norm_rows.cuh", "turn_ ^= 1;", ""),
    "rows of a block": (
        "thread",
        "data race",
        "column_sums.cuh",
        "      }\n      __syncthreads();\n    }",
        "      }\n    }",
    ),
    "barrier, by its result": ("none", "wrong", "norm_rows.cuh", LAST_SUM, LAST_SUM.replace("__syncthreads();", "")),
    "uninitialised": (
        "none",
        "error nan",
        "column_sums.cuh",
        "    scratch.sums[n][threadIdx.y][threadIdx.x] = sum;",
        "    if (sum != 0.0f) scratch.sums[n][threadIdx.y][threadIdx.x] = sum;",
    ),
    "uneven barrier": (
        "none",
        "deadlock",
        "norm_rows.cuh",
        "    }\n    __syncthreads();\n    const int warps",
        "      __syncthreads();\n    }\n    const int warps",
    ),
    "tile": ("thread", "data race", "token_dropout_tiles.cu", "    }\n    __syncthreads();\n\n", "    }\n\n"),
    "sums over samples": (
        "thread",
        "data race",
        "token_dropout_backward.cu",
        "sums[i];\n  __syncthreads();\n",
        "sums[i];\n",
    ),
    "alignment": ("none", "misaligned", "norm_plan.h", "width % elements == 0", "width > 0"),
    "barrier of the norms": (
        "thread",
        "data race",
        "lamb.cu",
        "  __syncthreads();\n  if (threadIdx.x >= 2) return;",
        "  if (threadIdx.x >= 2) return;",
    ),
    "alignment of one buffer": ("none", "misaligned", "lamb_table.cuh", "common ? head : kNoVectors", "head"),
    "one edge too many": (
        "address",
        "heap-buffer-overflow",
        "lamb_table.cuh",
        "edges = size - vectors * kVector;",
        "edges = size - vectors * kVector + 1;",
    ),
    "one too far": (
        "address",
        "heap-buffer-overflow",
        "norm_rows.cuh",
        "if (vector < vectors) body",
        "if (vector <= vectors) body",
    ),
}


@pytest.mark.parametrize("driver", ["none", "address", "thread"], indirect=True)
def test_the_driver_has_no_complaint(driver: Driver) -> None:
    for seed in range(3):
        assert driver.complaint(seed) == ""


@pytest.mark.parametrize(("driver", "fault"), [(FAULTS[name][0], name) for name in FAULTS], indirect=["driver"])
def test_a_planted_fault_is_seen(driver: Driver, fault: str) -> None:
    _, said, *change = FAULTS[fault]
    assert said in driver.planted(*change)
