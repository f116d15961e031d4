"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a program of their own."""

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
def test_kernels_are_clean(compiler: str, tmp_path: Path) -> None:
    x86 = platform.machine() in ("x86_64", "AMD64")
    common = [compiler, *SANITIZE, "-I", ROOT / "csrc", *(["-DEVAKERNELS_X86"] if x86 else [])]
    objects = []
    for isa, flags in ISA_FLAGS.items() if x86 else [("baseline", [])]:
        objects.append(tmp_path / f"{isa}.o")
        source = ROOT / "csrc/cpu/layer_norm_kernels.cpp"
        subprocess.run(
            [*common, *flags, f"-DEVAKERNELS_ISA_NAMESPACE={isa}", "-c", source, "-o", objects[-1]],
            check=True,
        )
    sources = [
        ROOT / "csrc/cpu/layer_norm.cpp",
        ROOT / "csrc/cpu/isa.cpp",
        Path(__file__).with_name("sanitizer_driver.cpp"),
    ]
    program = tmp_path / "driver"
    subprocess.run([*common, *sources, *objects, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "checks" in result.stdout
