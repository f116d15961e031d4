"""The launchers on raw buffers serve the emulated GPU kernels too."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from op_suite import build_emulated, copy_with_library, gcc, run_ops

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.slow,
    pytest.mark.skipif(gcc() is None, reason="no g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the fibers are written for x86-64"),
]


@pytest.fixture(scope="module")
def libraries(made_once: Callable[..., Path]) -> Path:
    return build_emulated(made_once) / "audit"


def test_the_launchers_on_raw_buffers_serve_the_emulated_kernels(libraries: Path, tmp_path: Path) -> None:
    tests = copy_with_library(tmp_path, libraries / "_ops.so")
    for module in libraries.glob("_C*.so"):
        shutil.copy(module, tests.parent / "evakernels")
    run_ops(choice="test", folder=tests, ops=["native_launchers"], PYTHONPATH=str(tests.parent))


def test_the_launchers_on_raw_buffers_leave_the_current_device_as_it_is(libraries: Path, tmp_path: Path) -> None:
    """Also where there was none, so that no context begins on a GPU that the process doesn't use."""
    tests = copy_with_library(tmp_path, libraries / "_ops.so")
    (module,) = libraries.glob("_C*.so")
    shutil.copy(module, tests.parent / "evakernels")
    code = """if True:
        import ctypes, numpy as np
        from evakernels import _C
        runtime = ctypes.CDLL(_C.__file__)
        x, out = np.ones((2, 2, 8), np.float32)
        statistics = np.zeros((2, 2), np.float32)
        for device in (None, 1, 0):
            if device is not None:
                runtime.emulated_set_device(device)
            _C.layer_norm_forward(x, None, None, out, *statistics, eps=1e-6, rms=False)
            print(runtime.emulated_device(), runtime.emulated_last_device())
    """
    environment = os.environ | {"PYTHONPATH": str(tests.parent)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tests, env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["-1", "0", "1", "0", "0", "0"], result.stderr
