"""Builds what lets ptx_interpreter run nvcc's kernels: tests/ptx/ptx.cmake, as it is or with faults planted."""

import importlib.util
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

from op_suite import ROOT, tool
from planted_faults import ASKED_FOR, FAULTS, call, changed_files

FOLDER = ROOT / "build/ptx"
"""Kept from run to run: what has not changed is not compiled again."""
OBJECTS = "CMakeFiles/cuda_kernels.dir/csrc/cuda"
ARCHS = "80-virtual,100-virtual"
"""What is shipped is PTX for these, or machine code that is made of it."""
# Device code can't ask for the environment: tests/ptx/drive.py puts the number into the PTX.
DECLARATION = f"""#pragma once
#include <cstdlib>
__host__ __device__ inline int planted() {{
  int number = 0;
#ifdef __CUDA_ARCH__
  asm("mov.u32 %0, PLANTED_FAULT;" : "=r"(number));
#else
  if (const char* const text = std::getenv("{ASKED_FOR}")) number = std::atoi(text);
#endif
  return number;
}}
#define planted_fault planted()
"""


def budget() -> ModuleType:
    """csrc/cuda/budget.py, which knows how kernels are compiled."""
    spec = importlib.util.spec_from_file_location("budget", ROOT / "csrc/cuda/budget.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_ptx() -> None:
    """`FOLDER/ptx` has _ops.so, drive.so and allocations.so."""
    budget().build("ptx", FOLDER, ARCHS, ["-lineinfo", "--no-compress"])


def build_planted(folder: Path) -> None:
    """Makes `folder/drive.so`, the driver with all faults; each strikes when asked for."""
    files = changed_files(FAULTS)
    changed = folder / "csrc/cuda"
    changed.mkdir(parents=True)
    for file, text in files.items():
        (changed / file).write_text(text)
    (folder / "planted.h").write_text(DECLARATION)
    listing = [tool("ninja"), "-t", "commands", "ptx_drive"]
    commands = subprocess.run(listing, cwd=FOLDER, capture_output=True, text=True, check=True).stdout.splitlines()
    objects = {}
    for unit in sorted({fault.unit for fault in FAULTS.values()}):
        true, faulty = f"{OBJECTS}/{unit}.o", str(folder / f"{unit}.o")
        (compiling,) = (shlex.split(command) for command in commands if f"-o {true}" in command)
        # The folder of the changed files comes before that of the right ones.
        first = next(i for i, word in enumerate(compiling) if word.startswith("-"))
        compiling[first:first] = ["-include", str(folder / "planted.h"), f"-I{folder / 'csrc'}"]
        words = [word.replace(true, faulty) for word in compiling if "compute_100" not in word]
        words[words.index("-c") + 1] = str(changed / unit if unit in files else ROOT / "csrc/cuda" / unit)
        call(words, FOLDER)
        objects[true] = faulty
    linking = shlex.split(commands[-1])
    linking = [objects.get(word, word) for word in linking if word not in (":", "&&")]
    linking[linking.index("-o") + 1] = str(folder / "drive.so")
    call(linking, FOLDER)


def nvcc() -> str | None:
    """Where setup.py finds it."""
    return shutil.which(os.environ.get("CUDACXX", "nvcc"))
