"""What the GPU kernels ask of memory, counted in the emulator: each byte once, whole words, no bank twice.

The same library shows that the launchers on raw buffers serve these kernels too.
"""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from op_suite import build_emulated, copy_with_library, gcc, run_ops

from benchmarks.audit.build import count_all

FORWARD, BACKWARD = 1.05, 1.10
WIDEST = 512  # bytes of a warp's request
WHOLE, PARTLY = (WIDEST, WIDEST), (400, 400)

# The most traffic over the floor, and the fewest bytes a load and store. Forward passes have some fifty rows; backward
# ones as many as keep the partial sums of three blocks, which count too, small.
EXPECTED = {
    ("layer_norm", "eva02-l14@112 b1", "forward"): (FORWARD, WHOLE),
    # 176 vectors a row: half of a warp has nothing to do in the last step.
    ("layer_norm", "eva01-g14@112 b1", "forward"): (FORWARD, PARTLY),
    ("layer_norm", "eva02-b16@224 b1", "backward"): (BACKWARD, WHOLE),
    ("add_layer_norm scaled", "eva02-b16@112 b1", "forward"): (FORWARD, WHOLE),
    ("add_layer_norm scaled", "eva02-b16@224 b1", "backward"): (BACKWARD, WHOLE),
    ("layer_norm_add scaled", "eva02-b16@112 b1", "forward"): (FORWARD, WHOLE),
    ("layer_norm_add scaled", "eva02-b16@224 b1", "backward"): (BACKWARD, WHOLE),
    # Rows of 5,460 bytes begin anywhere in a sector: of the words that neighbours share, each takes its own part.
    ("layer_norm of hidden", "eva02-l14@112 b1", "forward"): (FORWARD, PARTLY),
    ("layer_norm of hidden", "eva02-l14@224 b1", "backward"): (BACKWARD, PARTLY),
    ("add_layer_norm scaled of hidden", "eva02-l14@112 b1", "forward"): (FORWARD, PARTLY),
    ("add_layer_norm scaled of hidden", "eva02-l14@224 b1", "backward"): (BACKWARD, PARTLY),
    ("layer_norm_add scaled of hidden", "eva02-l14@112 b1", "forward"): (FORWARD, PARTLY),
    ("layer_norm_add scaled of hidden", "eva02-l14@224 b1", "backward"): (BACKWARD, PARTLY),
    ("silu_mul", "eva02-b16@64 b1", "forward"): (FORWARD, WHOLE),
    ("silu_mul", "eva02-b16@64 b1", "backward"): (BACKWARD, WHOLE),
    ("swiglu", "eva02-b16@112 b1", "forward"): (FORWARD, WHOLE),
    ("swiglu", "eva02-b16@224 b1", "backward"): (BACKWARD, WHOLE),
    ("swiglu", "eva02-l14@112 b1", "forward"): (FORWARD, PARTLY),
    ("swiglu", "eva02-l14@224 b1", "backward"): (BACKWARD, PARTLY),
    ("token_dropout", "eva02-b16@112 b8 drop50", "forward"): (FORWARD, WHOLE),
    ("token_dropout", "eva02-b16@112 b8 drop50", "backward"): (BACKWARD, WHOLE),
    # Of the patches of a channel, side by side, half are kept: each sector has some of both.
    ("token_dropout by channel", "eva02-b16@224 b8 drop50", "forward"): (1.70, (48, 128)),
    ("gelu", "eva02-b16:text b1", "forward"): (FORWARD, WHOLE),
    ("gelu", "eva02-b16:text b1", "backward"): (BACKWARD, WHOLE),
    # A prefix token alone has a tile of 16 slots, and 50 patches fill four in part. Backward walks over a head twice.
    ("rope_attention", "eva02-b16@112 b1", "forward"): (FORWARD, (450, 450)),
    ("rope_attention", "eva02-b16@112 b1", "backward"): (1.66, (450, 450)),
    # Heads of 88 channels begin and end in the middle of a sector, and requests where a row does not.
    ("rope_attention", "eva01-g14@112 b1", "forward"): (1.16, (440, 450)),
    ("rope_attention", "eva01-g14@112 b1", "backward"): (1.83, (430, 450)),
    ("rope_attention", "eva02-bige14@112 b1", "forward"): (FORWARD, (490, 490)),
    ("rope_attention", "eva02-bige14@112 b1", "backward"): (1.66, (480, 440)),
    ("causal_attention", "eva02-b16:text b1", "forward"): (FORWARD, (490, 490)),
    # Two passes: the norms must be known before the step. Parameter and gradient have 8 bytes a lane.
    ("lamb_step", "tiny@32 b1", "forward"): (1.50, (380, 380)),
    ("adamw_step", "tiny@32 b1", "forward"): (FORWARD, (380, 380)),
    # A number is all that is stored.
    ("gradient_norm", "tiny@32 b1", "forward"): (FORWARD, (250, 0)),
}
# The most bytes of memory, past a cache, over the floor where requests find there what others have left.
PAST_CACHE = {
    ("rope_attention", "eva02-b16@112 b1", "backward"): BACKWARD,
    ("rope_attention", "eva01-g14@112 b1", "forward"): FORWARD,
    ("rope_attention", "eva01-g14@112 b1", "backward"): BACKWARD,
    ("rope_attention", "eva02-bige14@112 b1", "backward"): BACKWARD,
    ("lamb_step", "tiny@32 b1", "forward"): FORWARD,
}
# And of memory that a step moves for a parameter, all in float32.
# The large one is twice the cache: the second phase, which goes backwards, finds there a little less than half of it.
BYTES_A_PARAMETER = {"lamb_step": 32.0, "lamb_step of a large tensor": 37.0, "adamw_step": 28.5, "gradient_norm": 4.1}


pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.slow,
    pytest.mark.skipif(gcc() is None, reason="no g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the fibers are written for x86-64"),
]


@pytest.fixture(scope="module")
def libraries(made_once: Callable[..., Path]) -> Path:
    return build_emulated(made_once) / "audit"


class Patterns:
    """The requests of one warp that tests/cuda_emulator/audit_patterns.cpp makes, and what the audit counts of them."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.run_pattern.restype = ctypes.c_char_p
        self.memory = ctypes.create_string_buffer(1024)
        # A line has 128 bytes.
        self.begin = (ctypes.addressof(self.memory) + 127) // 128 * 128

    def run(self, pattern: int, stride: int = 0, words: int = 1) -> None:
        self.library.audit_begin()
        failed = self.library.run_pattern(pattern, stride, words, ctypes.c_void_p(self.begin))
        self.library.audit_end()
        assert failed is None

    def worst_ways(self) -> int:
        out = (ctypes.c_int64 * 13)()
        self.library.audit_launch(ctypes.c_int64(0), out)
        return out[12]

    def stores(self) -> list[int]:
        """Requests, bytes and sectors."""
        out = (ctypes.c_int64 * 8)()
        begin, end = ctypes.c_uint64(self.begin), ctypes.c_uint64(self.begin + 512)
        self.library.audit_memory(ctypes.c_int64(0), begin, end, out)
        return out[4:7]


APART_4, APART_8, APART_16, ROWS, IN_ROUNDS, UNTOLD_ROUNDS, GLOBAL_ROUNDS, TWICE = range(8)


@pytest.mark.parametrize(
    ("pattern", "stride", "words", "ways"),
    [
        (APART_4, 4, 1, 1),
        (APART_4, 0, 1, 1),  # one word for all
        (APART_4, 8, 1, 2),
        (APART_4, 128, 1, 32),
        (APART_4, 132, 1, 1),
        # Two halves of a warp.
        (APART_8, 8, 1, 1),
        (APART_8, 16, 1, 2),
        (APART_8, 128, 1, 16),
        # Eight lanes at a time.
        (APART_16, 16, 1, 1),
        (APART_16, 32, 1, 2),
        (APART_16, 128, 1, 8),
        (APART_16, 144, 1, 1),
        # Where a row ends among eight lanes, one finds its bank taken.
        (ROWS, 144, 8, 1),
        (ROWS, 208, 12, 2),
        (ROWS, 192, 12, 1),
        (IN_ROUNDS, 0, 1, 1),
        # Lanes that left out the round before are taken for those of this one.
        (UNTOLD_ROUNDS, 0, 1, 2),
    ],
)
def test_conflicts_of_known_requests_are_counted(
    libraries: Path, pattern: int, stride: int, words: int, ways: int
) -> None:
    patterns = Patterns(libraries / "audit_patterns.so")
    patterns.run(pattern, stride, words)
    assert patterns.worst_ways() == ways


def test_lanes_that_leave_out_a_round_are_not_met_in_another(libraries: Path) -> None:
    patterns = Patterns(libraries / "audit_patterns.so")
    patterns.run(GLOBAL_ROUNDS)
    assert patterns.stores() == [4, 4 * 24 * 4, 4 * 4]


@pytest.mark.parametrize(("kilobytes", "reads"), [(128, 1), (256, 2)])
def test_blocks_that_run_at_the_same_time_share_the_cache(libraries: Path, kilobytes: int, reads: int) -> None:
    """Six blocks read their own parts twice, behind a cache of 1 MiB. One at a time, each would find its part there."""
    patterns = Patterns(libraries / "audit_patterns.so")
    size = kilobytes * 1024
    memory = ctypes.create_string_buffer(6 * size + 512)
    patterns.begin = (ctypes.addressof(memory) + 511) // 512 * 512
    patterns.run(TWICE, size)
    out = (ctypes.c_int64 * 2)()
    patterns.library.audit_cache(out)
    # A byte in sixteen is read, which is every sector; and what tells the kernel where they are.
    assert list(out) == [pytest.approx(reads * 6 * size, rel=1e-3), 0]


def test_each_byte_is_moved_once_in_whole_words_and_no_bank_is_asked_twice(libraries: Path) -> None:
    wrong = []
    cases = [(op, shape, "bfloat16", direction) for op, shape, direction in EXPECTED]
    for count in count_all(cases, libraries):
        traffic, (load, store) = EXPECTED[count.op, count.shape, count.direction]
        facts = count.traffic, count.bytes_a_load, count.bytes_a_store, count.worst_ways
        print(count.op, count.shape, count.direction, *facts, count.touched)
        # Less than the floor can only mean that something wasn't counted; token dropout's floor has all positions.
        if not 0.97 <= count.traffic <= traffic or count.touched > 1.5:
            wrong.append((count, "traffic"))
        if count.bytes_a_load < load or count.bytes_a_store < store:
            wrong.append((count, "bytes a request"))
        if count.worst_ways > 2:
            wrong.append((count, "bank conflicts"))
        if count.past_cache > PAST_CACHE.get((count.op, count.shape, count.direction), traffic):
            wrong.append((count, "past the cache"))
    assert not wrong, [(count.op, count.shape, count.direction, what, count.traffic) for count, what in wrong]


def test_a_step_moves_few_bytes_a_parameter(libraries: Path) -> None:
    """LAMB takes both phases of a few tensors at a time: their moments are in the cache for the second."""
    cases = [(op, "tiny@32 b1", "float32", "forward") for op in BYTES_A_PARAMETER]
    found = {count.op: count.memory / (count.sizes["grads"] / 4) for count in count_all(cases, libraries)}
    print(found)
    assert all(found[op] <= most for op, most in BYTES_A_PARAMETER.items()), found
    assert found["lamb_step"] >= 28


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
