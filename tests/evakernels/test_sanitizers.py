"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a program of their own."""

import itertools
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZE = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
ISA_FLAGS = {
    "baseline": [],
    "avx2": AVX2,
    "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
}

PROGRAMS = {
    "sanitizer_driver.cpp": ["layer_norm"],
    "sanitizer_residual.cpp": ["residual_norm", "token_dropout"],
}
"""Programs, and the ops that each runs."""


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    probe = tmp_path_factory.mktemp("probe") / "probe"
    program = subprocess.run(
        [found, *SANITIZE, "-x", "c++", "-", "-o", probe],
        input="int main() {}",
        text=True,
        capture_output=True,
    )
    if program.returncode != 0:
        pytest.skip(f"{found} has no sanitizer libraries")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("driver", PROGRAMS)
def test_kernels_are_clean(driver: str, compiler: str, tmp_path: Path) -> None:
    x86 = platform.machine() in ("x86_64", "AMD64")
    common = [compiler, *SANITIZE, "-I", ROOT / "csrc", *(["-DEVAKERNELS_X86"] if x86 else [])]
    objects = []
    isas = ISA_FLAGS.items() if x86 else [("baseline", [])]
    for (isa, flags), op in itertools.product(isas, PROGRAMS[driver]):
        objects.append(tmp_path / f"{op}_{isa}.o")
        source = ROOT / f"csrc/cpu/{op}_kernels.cpp"
        subprocess.run(
            [*common, *flags, f"-DEVAKERNELS_ISA_NAMESPACE={isa}", "-c", source, "-o", objects[-1]],
            check=True,
        )
    sources = [
        *(ROOT / f"csrc/cpu/{op}.cpp" for op in PROGRAMS[driver]),
        ROOT / "csrc/cpu/isa.cpp",
        Path(__file__).with_name(driver),
    ]
    program = tmp_path / "driver"
    subprocess.run([*common, *sources, *objects, "-o", program], check=True)
    # The stack frames of that check hold vectors of 64 bytes at half their alignment under GCC 12.
    environment = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    result = subprocess.run([program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "checks" in result.stdout
