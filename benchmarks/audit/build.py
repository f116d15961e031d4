"""Builds the library that holds the kernels' PTX, and counts with it."""

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

from benchmarks.audit.budget import ROOT, budget
from benchmarks.audit.cases import Case
from benchmarks.audit.occupancy import SHARED
from benchmarks.audit.result import Count
from evaclip.errors import UserError

ARCHS = {"cuda": ("sm_80", "sm_90", "sm_100"), "triton": ("sm_80", "sm_90")}


def count_all(cases: Sequence[Case], arch: str, kernels: str = "cuda", library: Path | None = None) -> list[Count]:
    """What was counted in each case.

    Args:
        cases: what to count.
        arch: the architecture whose PTX is run, and whose shared memory attention plans for.
        kernels: `cuda` or `triton`.
        library: that with nvcc's PTX of the kernels; by default it is built.

    Raises:
        UserError: there is no nvcc or no Triton, or the build or a case failed.
    """
    require({kernels})
    if kernels == "triton":
        return _count(cases, arch, "triton", ROOT)
    library = library or _build()
    with tempfile.TemporaryDirectory() as package:
        # This folder comes first, so that its evakernels is the one that is imported.
        shutil.copytree(ROOT / "evakernels", Path(package) / "evakernels", ignore=shutil.ignore_patterns("*.so"))
        beside = Path(package) / "evakernels/_ops.so"
        beside.symlink_to(library)
        return _count(cases, arch, str(beside), Path(package))


def require(kinds: Collection[str]) -> None:
    """Raise `UserError` with the command that installs what the audit of these kernels lacks here."""
    packages = []
    if "cuda" in kinds and budget().nvcc() is None:
        packages += ["nvidia-cuda-nvcc", "nvidia-cuda-cccl"]
    if "triton" in kinds and find_spec("triton") is None:
        packages.append("triton")
    if packages:
        raise UserError(f"the audit compiles the GPU kernels; not installed: pip install {' '.join(packages)}")


def _build() -> Path:
    try:
        budget().build("ptx_ops")
    except RuntimeError as error:
        raise UserError(f"compiling the GPU kernels failed: {str(error)[-3000:]}") from error
    return Path(budget().BUILD) / "ptx/_ops.so"


def _count(cases: Sequence[Case], arch: str, library: str, folder: Path) -> list[Count]:
    paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    shared = SHARED[arch] // 1024 - 1  # a block may have all but what the system takes
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PTX_SHARED_KB": str(shared)}
    call = [sys.executable, "-m", "benchmarks.audit.count", arch, library, json.dumps(cases)]
    done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, check=False)
    if done.returncode:
        raise UserError(f"counting on {arch} failed: {done.stderr.decode(errors='replace')[-3000:]}")
    counts: list[Count] = pickle.loads(done.stdout)
    return counts
