"""Builds the library with the kernels' PTX, and counts with it."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks import ROOT
from benchmarks.audit import budget
from benchmarks.audit.cases import Case
from benchmarks.audit.result import Count
from evaclip.errors import UserError
from ptx_interpreter.gpus import GPUS

ARCHS = {"cuda": ("sm_80", "sm_90", "sm_100"), "triton": ("sm_80", "sm_90")}


def count_all(cases: Sequence[Case], arch: str, kernels: str = "cuda", library: Path | None = None) -> list[Count]:
    """The counts of each case.

    Args:
        cases: calls of ops.
        arch: architecture of the PTX, and of the shared memory that attention plans for.
        kernels: `cuda` or `triton`.
        library: a library with nvcc's PTX of the kernels; by default it is built.

    Raises:
        UserError: there is no nvcc or no Triton, or the build or a case failed.
    """
    require({kernels})
    if kernels == "triton":
        return _count(cases, arch, "triton", ROOT)
    if library is None:
        try:
            budget().build("ptx_ops")
        except RuntimeError as error:
            raise UserError(f"compiling the GPU kernels failed: {str(error)[-3000:]}") from error
        library = Path(budget().BUILD) / "ptx/_ops.so"
    with tempfile.TemporaryDirectory() as package:
        # This folder comes first in Python's path.
        shutil.copytree(ROOT / "evakernels", Path(package) / "evakernels", ignore=shutil.ignore_patterns("*.so"))
        copy = Path(package) / "evakernels/_ops.so"
        copy.symlink_to(library)
        return _count(cases, arch, str(copy), Path(package))


def require(kinds: Collection[str]) -> None:
    """Raise `UserError` with the command that installs the missing packages of an audit of these kernels."""
    packages = []
    if "cuda" in kinds and budget().nvcc() is None:
        packages += ["nvidia-cuda-nvcc", "nvidia-cuda-cccl"]
    if "triton" in kinds and find_spec("triton") is None:
        packages.append("triton")
    if packages:
        raise UserError(f"the audit compiles the GPU kernels; not installed: pip install {' '.join(packages)}")


def _count(cases: Sequence[Case], arch: str, library: str, folder: Path) -> list[Count]:
    paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    shared = str(next(gpu.shared_kb for gpu in GPUS.values() if arch == f"sm_{gpu.capability}"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PTX_SHARED_KB": shared}
    call = [sys.executable, "-m", "benchmarks.audit.count", arch, library, json.dumps(cases)]
    done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, check=False)
    if done.returncode:
        raise UserError(f"counting on {arch} failed: {done.stderr.decode(errors='replace')[-3000:]}")
    counts: list[Count] = pickle.loads(done.stdout)
    return counts
