"""The kernels for GPUs, run on the CPU by tests/cuda_emulator: the files that nvcc compiles, as the ops call them.

The ops' own tests drive a library in which these kernels serve CPU tensors, under several orders of the threads and
under sanitizers; what Python can't be run under, a program without it does. Faults that are planted show that the
checks see something.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from op_suite import CHOICE, build_emulated, copy_with_library, gcc, run_ops, sanitizer_runtimes
from planted_faults import ASKED_FOR, FAULTS, NUMBERS, OBJECTS, build_planted

OPS = ("adamw", "gelu", "gradient_norm", "lamb", "native_lamb")
OPS += ("layer_norm", "residual_norm", "norm_widths", "packed_attention", "rope_attention", "stochastic_rounding")
OPS += ("swiglu", "token_dropout")
MORE = ("every_mix", "no_rows", "one_element", "strided", "finite", "bit_equal", "lamb", "any_layout", "refuses")
# Not the tests that are about the size of other kernels' chunks, nor those of the file that "lamb" names too which are
# of its op, whichever kernels serve it.
CHECKS = f"({' or '.join((CHOICE, *MORE))}) and not (several_chunks or opcheck or compiles)"
LEAST_COVERAGE = 0.95
VARIANTS = ("coverage", "address", "thread")
SANITIZER_OPTIONS = {
    # Its copies of stack frames would be made and thrown away with every fiber.
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "TSAN_OPTIONS": "atexit_sleep_ms=0 halt_on_error=1",
}

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.slow,
    pytest.mark.skipif(gcc() is None, reason="no g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the fibers are written for x86-64"),
]


@pytest.fixture(scope="module")
def emulated(made_once: Callable[..., Path]) -> Path:
    return build_emulated(made_once)


@pytest.fixture
def tests(emulated: Path, tmp_path: Path) -> Path:
    """A copy of the ops' tests, with a library in which the emulated kernels serve the CPU."""
    return copy_with_library(tmp_path, emulated / "coverage/_ops.so")


def counts_in(build: Path, folder: Path) -> dict[str, str]:
    """The environment in which lines that are run are counted in `folder`, and not beside the objects in `build`."""
    return {"GCOV_PREFIX": str(folder), "GCOV_PREFIX_STRIP": str(len(build.parts) - 1)}


def line_coverage(build: Path, counts: Path) -> dict[Path, float]:
    """The share of the lines of each file of device code that were run."""
    runs: dict[Path, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for notes in (build / OBJECTS.format("coverage")).glob("*.gcno"):
        copy = shutil.copy(notes, counts / OBJECTS.format("coverage"))
        report = subprocess.run(["gcov", "--json-format", "--stdout", copy], capture_output=True, check=True).stdout
        for file in json.loads(report)["files"]:
            path = (build / file["file"]).resolve()
            if path.parent.name == "cuda":
                for line in file["lines"]:
                    runs[path][line["line_number"]] += line["count"]
    return {path: sum(count > 0 for count in lines.values()) / len(lines) for path, lines in runs.items()}


# Of the emulator's three ways to choose the next thread, and of the sizes of shared memory that attention plans for:
# 227 KB (H100) and 163 KB (A100). The address sanitizer's test takes what is left, 99 KB.
@pytest.mark.parametrize(("seed", "shared"), [(0, 227), (2, 163)])
def test_ops_run_nearly_every_line_of_device_code(
    emulated: Path, tests: Path, tmp_path: Path, seed: int, shared: int
) -> None:
    environment = {"PYTHONPATH": str(tests.parent), "EVAKERNELS_EMULATOR_SEED": str(seed)}
    environment["EVAKERNELS_EMULATOR_SHARED_KB"] = str(shared)
    counts = tmp_path / "counts"
    run_ops(choice=CHECKS, folder=tests, ops=OPS, **environment, **counts_in(emulated, counts))
    coverage = line_coverage(emulated, counts)
    report = "\n".join(f"{share:.0%} {path.name}" for path, share in sorted(coverage.items()))
    print(report)
    assert len(coverage) >= 8, report
    assert min(coverage.values()) >= LEAST_COVERAGE, report


def test_ops_are_clean_under_the_address_sanitizer(emulated: Path, tmp_path: Path) -> None:
    watched = copy_with_library(tmp_path, emulated / "address/_ops.so")
    run_ops(
        choice=CHECKS,
        folder=watched,
        ops=OPS,
        PYTHONPATH=str(watched.parent),
        LD_PRELOAD=" ".join(sanitizer_runtimes(str(gcc()))),
        EVAKERNELS_EMULATOR_SEED="1",
        ASAN_OPTIONS=SANITIZER_OPTIONS["ASAN_OPTIONS"],
    )


def test_the_emulated_kernels_are_what_runs(tests: Path) -> None:
    """A kernel that fails is an error with the op's name."""
    environment = {"PYTHONPATH": str(tests.parent), "EVAKERNELS_EMULATOR_BREAKDOWN": "1"}
    code = "import torch, evakernels; evakernels.layer_norm(torch.ones(2, 4))"
    call = [sys.executable, "-c", code]
    result = subprocess.run(call, cwd=tests, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert "layer_norm_forward: CUDA error: a breakdown, as asked for" in result.stderr


def printed(code: str, tests: Path, **environment: str) -> str:
    """What a Python program prints that runs on the emulated kernels."""
    environment = os.environ | {"PYTHONPATH": str(tests.parent)} | environment
    call = [sys.executable, "-c", code]
    return subprocess.run(call, env=environment, cwd=tests, capture_output=True, text=True, check=True).stdout


def test_attention_of_1025_tokens_is_as_accurate_as_torch(tests: Path) -> None:
    """The most that is promised: an image of 32 by 32 patches. Forward, of one head; no other test has so many stages
    and parts of a head."""
    code = """if True:
        import torch, evakernels
        from op_checks import error
        from test_rope_attention import rotate
        generator = torch.Generator().manual_seed(0)
        qkv = [torch.randn(1, 1025, 1, 64, generator=generator).bfloat16() for _ in range(3)]
        cos, sin = evakernels.nn.axial_rope(32, 32, head_dim=64)
        def theirs(dtype):
            q, k, v = (t.to(dtype).transpose(1, 2) for t in qkv)
            q, k = (rotate(t, cos, sin, None, 1, True) for t in (q, k))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        exact, out = theirs(torch.float64), evakernels.rope_attention(*qkv, cos, sin, num_prefix=1)
        print(error(out, exact), error(theirs(torch.bfloat16), exact), exact.abs().max().item())
    """
    ours, torchs, largest = map(float, printed(code, tests).split())
    assert ours <= 2 * torchs + 2**-8 * largest


def test_float32_gradients_of_long_sequences_fit_into_the_least_shared_memory(tests: Path) -> None:
    """Of 99 KB, where the scalars of all tokens leave no room for four warps. The blocks have what max_length asks for;
    the sequences themselves are short, as the emulator is slow."""
    code = """if True:
        import torch, evakernels
        offsets = torch.arange(0, 4097, 64)
        qkv = [torch.randn(4096, 1, 128, requires_grad=True) for _ in range(3)]
        def gradients(backend):
            with evakernels.use_backend(backend):
                out = evakernels.packed_attention(*qkv, offsets, max_length=4096)
                return torch.autograd.grad(out, qkv, torch.ones_like(out))
        for ours, theirs in zip(gradients("cpu"), gradients("reference")):
            print((ours - theirs).abs().max().item() <= 1e-4 * theirs.abs().max().item())
    """
    assert printed(code, tests, EVAKERNELS_EMULATOR_SHARED_KB="99").split() == ["True"] * 3


def test_the_cuda_runtime_is_asked_once_for_what_does_not_change(tests: Path) -> None:
    """A second step of the same shapes asks for no attribute, occupancy or version again."""
    code = """if True:
        import ctypes, torch, evakernels
        from evakernels import _native
        queries = ctypes.CDLL(str(_native._LIBRARY)).emulated_queries
        weight = torch.ones(768, requires_grad=True)
        def step():
            rows = torch.randn(8, 768, requires_grad=True)
            q, k, v = (torch.randn(1, 160, 1, 64, requires_grad=True).bfloat16() for _ in range(3))
            evakernels.layer_norm(rows, weight).sum().backward()
            evakernels.rope_attention(q, k, v).sum().backward()
            lists = [weight], [weight.grad], [torch.zeros(768)], [torch.zeros(768)], [torch.zeros(())]
            with torch.no_grad():
                evakernels.lamb_step(*lists, [0.1], [0.0], betas=(0.9, 0.99), eps=1e-6)
        step()
        first = queries()
        step()
        print(first, queries() - first)
    """
    first, second = map(int, printed(code, tests).split())
    assert 0 < first < 20
    assert second == 0


def test_what_a_kernel_was_let_have_it_keeps(tests: Path) -> None:
    """The runtime takes the last word: after a launch with less shared memory a larger one still runs."""
    code = """if True:
        import torch, evakernels
        for tokens in (257, 200, 257):
            print(torch.isfinite(evakernels.rope_attention(*torch.ones(3, 1, tokens, 1, 64).bfloat16())).all().item())
    """
    assert printed(code, tests).split() == ["True"] * 3


def test_a_driver_that_takes_no_large_arguments_is_told(tests: Path) -> None:
    code = """if True:
        import torch, evakernels
        tensor = torch.ones(4)
        lists = [tensor], [tensor], [tensor.clone()], [tensor.clone()], [torch.zeros(())]
        for call in (
            lambda: evakernels.gradient_norm([tensor]),
            lambda: evakernels.adamw_update(*lists, [0.1], [0.0], betas=(0.9, 0.99), eps=1e-6),
        ):
            try:
                call()
                print("no error")
            except RuntimeError as error:
                print(error)
    """
    old = printed(code, tests, EVAKERNELS_EMULATOR_DRIVER="12000")
    assert old.count("the driver is too old for 32 KB of kernel arguments") == 2, old
    assert printed(code, tests, EVAKERNELS_EMULATOR_DRIVER="12010").count("no error") == 2


def test_a_wrong_index_ends_the_launch(tests: Path) -> None:
    """Of patches in either order. Ops on a CPU check it beforehand; on a GPU nobody but the kernels does."""
    code = """if True:
        import torch, evakernels
        patches, index = torch.ones(2, 6, 4), torch.tensor([[0, 1], [5, 6]])
        for view in (patches, patches.transpose(1, 2).contiguous().transpose(1, 2)):
            try:
                torch.ops.evakernels_native.token_dropout_forward(view, index, None, None)
            except RuntimeError as error:
                print(error)
    """
    text = printed(code, tests)
    assert text.count("token_dropout: token_index is out of range") == 2, text


def test_offsets_that_do_not_fit_end_the_launch(tests: Path) -> None:
    code = """if True:
        import torch, evakernels
        q = torch.ones(5, 1, 8)
        for offsets, longest in (([0, 6], 6), ([0, 4, 2], 4), ([-1, 2], 3), ([0, 5], 4)):
            try:
                torch.ops.evakernels_native.packed_attention_forward(q, q, q, torch.tensor(offsets), longest, True, 1.0)
            except RuntimeError as error:
                print(error)
    """
    text = printed(code, tests)
    assert text.count("packed_attention: offsets are out of range, or a sequence is longer than max_length") == 4, text


def complaint(driver: Path, *arguments: str, **environment: str) -> str:
    """What the program or the sanitizer says; nothing if all is right."""
    # The thread sanitizer of older compilers can't run where addresses are drawn at random.
    command = [*(["setarch", "-R"] if shutil.which("setarch") else []), driver, *arguments]
    environment = SANITIZER_OPTIONS | counts_in(driver.parent, driver.with_suffix(".counts")) | environment
    environment = os.environ | environment
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    return "" if result.returncode == 0 else f"exit code {result.returncode}: {result.stdout}{result.stderr}"


@pytest.fixture
def planted(emulated: Path, made_once: Callable[..., Path]) -> Callable[[str], Path]:
    """The driver of a variant that has all the faults which it shows."""

    def driver(variant: str) -> Path:
        folder = made_once(f"planted-{variant}", lambda folder: build_planted(emulated, folder, variant))
        return folder / "drive"

    return driver


# Of three orders the results are looked at. The sanitizers' verdict on an access depends on none.
@pytest.mark.parametrize(("variant", "seeds"), [("coverage", (0, 1, 2)), ("address", (2,)), ("thread", (0,))])
def test_the_driver_has_no_complaint(emulated: Path, variant: str, seeds: tuple[int, ...]) -> None:
    for seed in seeds:
        assert complaint(emulated / f"drive_{variant}", EVAKERNELS_EMULATOR_SEED=str(seed)) == ""


# A variant's drivers are one process's: the first of these tests compiles for all of them.
def of_variant(variant: str, *values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.xdist_group(f"planted {variant}"), id=str(values[0]))


@pytest.mark.parametrize("variant", [of_variant(variant, variant) for variant in VARIANTS])
def test_what_is_planted_is_the_only_fault(planted: Callable[[str], Path], variant: str) -> None:
    families = {fault.family for fault in FAULTS.values() if fault.variant == variant}
    assert complaint(planted(variant), *families) == ""


@pytest.mark.parametrize("name", [of_variant(fault.variant, name) for name, fault in FAULTS.items()])
def test_a_planted_fault_is_seen(planted: Callable[[str], Path], name: str) -> None:
    fault = FAULTS[name]
    assert fault.said in complaint(planted(fault.variant), fault.family, **{ASKED_FOR: str(NUMBERS[name])})
