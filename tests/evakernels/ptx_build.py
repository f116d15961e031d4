"""Builds tests/cuda/ptx.cmake, on which ptx_interpreter runs nvcc's kernels, with or without planted faults."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from op_suite import ROOT, tool
from planted_faults import REQUESTED, changed_files, units

from benchmarks.audit import budget as load_budget

budget = load_budget()
BUILD: Path = budget.BUILD
OBJECTS = "CMakeFiles/cuda_kernels.dir/csrc/cuda"
# Device code can't read the environment: tests/cuda/drive.py writes the number into the PTX.
DECLARATION = f"""#pragma once
#include <cstdlib>
__host__ __device__ inline int planted() {{
  int number = 0;
#ifdef __CUDA_ARCH__
  asm("mov.u32 %0, PLANTED_FAULT;" : "=r"(number));
#else
  if (const char* const text = std::getenv("{REQUESTED}")) number = std::atoi(text);
#endif
  return number;
}}
#define planted_fault planted()
"""


def call(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-5000:]


def gxx() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build_planted(folder: Path) -> None:
    """Builds `folder/_ops.so`, the library with all faults; each applies when it is requested."""
    files = changed_files()
    changed = folder / "csrc/cuda"
    changed.mkdir(parents=True)
    for file, text in files.items():
        (changed / file).write_text(text)
    (folder / "planted.h").write_text(DECLARATION)
    listing = [tool("ninja"), "-t", "commands", "ptx_ops"]
    commands = subprocess.run(listing, cwd=BUILD, capture_output=True, text=True, check=True).stdout.splitlines()
    objects = {}
    for unit in sorted(set(units().values())):
        true, faulty = f"{OBJECTS}/{unit}.o", str(folder / f"{unit}.o")
        (compiling,) = (shlex.split(command) for command in commands if f"-o {true}" in command)
        # Include the changed files instead of the original ones.
        first = next(i for i, word in enumerate(compiling) if word.startswith("-"))
        compiling[first:first] = ["-include", str(folder / "planted.h"), f"-I{folder / 'csrc'}"]
        words = [word.replace(true, faulty) for word in compiling if "compute_100" not in word]
        words[words.index("-c") + 1] = str(changed / unit if unit in files else ROOT / "csrc/cuda" / unit)
        call(words, BUILD)
        objects[true] = faulty
    linking = shlex.split(commands[-1])
    linking = [objects.get(word, word) for word in linking if word not in (":", "&&")]
    linking[linking.index("-o") + 1] = str(folder / "_ops.so")
    call(linking, BUILD)
