"""What the GPU kernels ask of memory, counted in the emulator: each byte once, whole words, no bank twice.

The same library shows that the launchers on raw buffers serve these kernels too.
"""

import platform
import shutil
from pathlib import Path

import pytest
from op_suite import build_emulated, copy_with_library, gcc, run_ops

from benchmarks.audit.build import count_all
from benchmarks.audit.cases import list_cases

FORWARD, BACKWARD = 1.05, 1.10
WIDEST = 512  # bytes of a warp's request
WHOLE, PARTLY = (WIDEST, WIDEST), (400, 400)

# The most traffic over the floor, and the fewest bytes a load and store. Partial sums of three blocks, as the
# emulator has them, count too.
EXPECTED = {
    # op, shape: forward, backward
    ("layer_norm", "eva02-l14@224 b1"): ((FORWARD, WHOLE), (BACKWARD, WHOLE)),
    # 176 vectors a row: half of a warp has nothing to do in the last step.
    ("layer_norm", "eva01-g14@224 b1"): ((FORWARD, PARTLY), (BACKWARD, PARTLY)),
    ("add_layer_norm scaled", "eva02-b16@224 b1"): ((FORWARD, WHOLE), (BACKWARD, WHOLE)),
    ("layer_norm_add scaled", "eva02-b16@224 b1"): ((FORWARD, WHOLE), (BACKWARD, WHOLE)),
    ("silu_mul", "eva02-b16@224 b1"): ((FORWARD, WHOLE), (BACKWARD, WHOLE)),
    ("swiglu", "eva02-b16@224 b1"): ((FORWARD, WHOLE), (BACKWARD, WHOLE)),
    # Rows of 5,460 bytes begin anywhere in a sector: words of 4 bytes, 128 a request, which lie in 5 sectors, not 4.
    # The next request finds the fifth in the cache, so that memory is asked for little more (`touched`).
    ("swiglu", "eva02-l14@224 b1"): ((1.23, (126, 126)), (1.25, (126, 126))),
    ("token_dropout", "eva02-b16@224 b8 drop50"): ((FORWARD, WHOLE), (BACKWARD, WHOLE)),
    # It reads what belongs to its tokens, 2 bytes each, half of those that lie side by side, and writes 4 a lane.
    ("token_dropout by channel", "eva02-b16@224 b8 drop50"): ((2.0, (30, 128)), (BACKWARD, WHOLE)),
    # Two passes: the norms must be known before the step. 8 bytes a lane of parameter and gradient.
    ("lamb_step", "tiny@32 b1"): ((1.46, (380, 380)), None),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(gcc() is None, reason="no g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the fibers are written for x86-64"),
]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_emulated(tmp_path_factory) / "audit"


def test_each_byte_is_moved_once_in_whole_words_and_no_bank_is_asked_twice(libraries: Path) -> None:
    wrong = []
    cases = [case for op, shape in EXPECTED for case in list_cases([op], [shape], ["bfloat16"])]
    for count in count_all(cases, libraries):
        traffic, (load, store) = EXPECTED[count.op, count.shape][count.direction == "backward"]
        facts = count.traffic, count.bytes_a_load, count.bytes_a_store, count.worst_ways
        print(count.op, count.shape, count.direction, *facts, count.touched)
        # Less than the floor can only mean that something wasn't counted; token dropout's floor has all positions.
        if not 0.97 <= count.traffic <= traffic or count.touched > 1.5:
            wrong.append((count, "traffic"))
        if count.bytes_a_load < load or count.bytes_a_store < store:
            wrong.append((count, "bytes a request"))
        if count.worst_ways > 2:
            wrong.append((count, "bank conflicts"))
    assert not wrong, [(count.op, count.shape, count.direction, what, count.traffic) for count, what in wrong]


def test_the_launchers_on_raw_buffers_serve_the_emulated_kernels(libraries: Path, tmp_path: Path) -> None:
    tests = copy_with_library(tmp_path, libraries / "_ops.so")
    for module in libraries.glob("_C*.so"):
        shutil.copy(module, tests.parent / "evakernels")
    run_ops(choice="test", folder=tests, ops=["native_launchers"], PYTHONPATH=str(tests.parent))
