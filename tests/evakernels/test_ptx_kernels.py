"""The kernels for GPUs as nvcc and Triton compiled them: their PTX, run on the CPU by ptx_interpreter.

The ops' own tests call them; a race, a read of what nobody has written, an access out of bounds or an uneven barrier is
an error of the op. The program that drives the launchers runs on them too. Faults that are planted in the kernels, and
compiled, show that these checks see something.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from op_suite import CHOICE, copy_with_library, run_ops
from planted_faults import ASKED_FOR, FAULTS, NUMBERS
from ptx_build import CAPABILITIES, SAID, build, build_with_faults, find_nvcc
from test_triton_kernels import CHOSEN, FILES

from evakernels.triton import FAMILIES
from ptx_interpreter.launches import newest_for, ptx_in
from ptx_interpreter.lines import lines_of

OPS = ("adamw", "gelu", "gradient_norm", "lamb", "native_lamb")
OPS += ("layer_norm", "residual_norm", "norm_widths", "packed_attention", "rope_attention", "stochastic_rounding")
OPS += ("swiglu", "token_dropout")
MORE = ("every_mix", "no_rows", "one_element", "strided", "finite", "bit_equal", "lamb", "any_layout")
# Not the tests that are about the size of other kernels' chunks, nor those of the file that "lamb" names too which are
# of its op, whichever kernels serve it.
CHECKS = f"({' or '.join((CHOICE, *MORE))}) and not (several_chunks or opcheck or compiles)"
SHARED_KB = {80: 163, 100: 227}
LEAST_COVERAGE = 0.95
ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.exhaustive, pytest.mark.slow]
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def built(made_once: Callable[..., Path]) -> Path:
    """The folder of the library, the driver's program and what follows allocations."""
    made_once("ptx", lambda folder: build())
    return build.folder / "ptx"


def environment_of(built: Path, *folders: Path, **more: object) -> dict[str, str]:
    """Of a process whose launches are served."""
    paths = [*folders, ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "LD_PRELOAD": str(built / "allocations.so")}
    return environment | {name: str(value) for name, value in more.items()}
