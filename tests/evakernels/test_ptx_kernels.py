"""GPU kernels as compiled by nvcc and Triton: ptx_interpreter runs their PTX on the CPU, under the ops' own tests.

Races, uninitialised reads, accesses out of bounds or misaligned, copies without a wait and uneven barriers fail the op.
tests/cuda/drive.py runs on them as well, also with planted faults, which must be reported.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp

import pytest
from op_suite import ROOT, copy_with_library, run_ops
from planted_faults import FAULTS, NUMBERS, REQUESTED, family_of, units
from ptx_build import BUILD, budget, build_planted, gxx

from evakernels.triton import FAMILIES
from ptx_interpreter import Module
from ptx_interpreter.gpus import GPUS
from ptx_interpreter.memory import build_allocations
from ptx_interpreter.runtime import newest_for, ptx_in

OPS = {
    "norms": ("layer_norm",),
    "widths": ("norm_widths",),
    "attention": ("packed_attention", "rope_attention"),
    "losses": ("contrastive",),
    "elements": ("gelu", "swiglu", "token_dropout"),
}
"""Test files by process, which parses the kernels that they share once."""
CHECKED = {80: "nvcc", 100: "nvcc=float32,bfloat16,float64"}
"""Tests by compute capability of the PTX; float16 only on the older one."""
SHARED_KB = {80: 163, 100: 227}
"""Shared memory per block by compute capability, which attention plans for."""
AGAIN = OPS.keys() - {"widths"}
"""Ops that also run on the newer PTX, which another compiler generates."""
FILES = {
    "layer_norm": ("layer_norm", "norm_widths"),
    "adamw": ("adamw", "native_optimizers", "optimizers", "stochastic_rounding"),
}
"""Test files of families with other files than their own."""
# Tests on Triton's PTX by compute capability; on the older one few optimizer tests, and of other ops only bfloat16.
EDGES = ("triton bfloat16=bfloat16", "triton edges=float32,bfloat16,float16")
TRITON = {80: ("triton=bfloat16", *EDGES), 90: ("triton", *EDGES)}
OPTIMIZERS = {80: ("triton",), 90: ("triton", "newest triton")}
LEAST_COVERAGE = 0.95

pytestmark = [pytest.mark.exhaustive, pytest.mark.slow, pytest.mark.skipif(gxx() is None, reason="no g++")]
needs_nvcc = pytest.mark.skipif(budget.nvcc() is None, reason="no nvcc")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
Environment = Callable[..., dict[str, str]]


@pytest.fixture(scope="module")
def served(made_once: Callable[..., Path]) -> Environment:
    """`served(folder, NAME=value)`: environment of a process with interpreted launches."""
    library = made_once("allocations", build_allocations) / "allocations.so"

    def environment(*folders: Path, **more: object) -> dict[str, str]:
        paths = os.pathsep.join(map(str, [*folders, ROOT]))
        return {"PYTHONPATH": paths, "LD_PRELOAD": str(library)} | {name: str(value) for name, value in more.items()}

    return environment


@pytest.fixture(scope="module")
def built(made_once: Callable[..., Path]) -> Path:
    """Folder of the library and the Python module."""
    made_once("ptx", lambda folder: budget.build("ptx"))
    return BUILD / "ptx"


@pytest.fixture(scope="module")
def lines_run(built: Path, served: Environment, made_once: Callable[..., Path]) -> Callable[[int, str], Path]:
    """`lines_run(capability, name)` runs the tests of OPS[name] and returns the file of executed lines."""

    def run(folder: Path, capability: int, ops: str) -> None:
        folder.mkdir(exist_ok=True)  # after a failure
        tests = copy_with_library(Path(mkdtemp(dir=folder)), built / "_ops.so")
        before = f"from ptx_launches import nvcc_kernels\nwith nvcc_kernels({capability}, {str(folder / 'lines')!r})"
        environment = served(tests.parent, PTX_SHARED_KB=SHARED_KB[capability])
        run_ops(before, [CHECKED[capability]], tests, OPS[ops], **environment)

    def lines(capability: int, ops: str) -> Path:
        return made_once(f"ptx-{capability}-{ops}", lambda folder: run(folder, capability, ops)) / "lines"

    return lines


@needs_nvcc
@pytest.mark.parametrize(("capability", "ops"), [(80, ops) for ops in OPS] + [(100, ops) for ops in sorted(AGAIN)])
def test_ops(lines_run: Callable[[int, str], Path], capability: int, ops: str) -> None:
    assert lines_run(capability, ops).exists()


@needs_nvcc
def test_ops_cover_device_code(built: Path, lines_run: Callable[[int, str], Path]) -> None:
    counts = [count for ops in OPS for count in json.loads(lines_run(80, ops).read_text())]
    runs = {(file, line) for file, line, count in counts if count}
    lines: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for texts in ptx_in((built / "_ops.so").read_bytes()):
        for file, line in Module(newest_for(texts, 80)).lines():
            if Path(file).parent == ROOT / "csrc/cuda":
                lines[Path(file).name].add((file, line))
    shares = {name: len(own & runs) / len(own) for name, own in lines.items()}
    report = "\n".join(f"{share:.0%} {name}" for name, share in sorted(shares.items()))
    print(report)
    assert len(shares) >= 20, report
    # One line of a small header is more than that share.
    missed = {name: len(own - runs) for name, own in lines.items() if len(own - runs) > 1}
    assert all(count <= (1 - LEAST_COVERAGE) * len(lines[name]) for name, count in missed.items()), report


@pytest.fixture
def printed(built: Path, served: Environment, tmp_path: Path) -> Callable[..., str]:
    """Output of a Python program that runs nvcc's kernels for compute capability 8.0."""
    tests = copy_with_library(tmp_path, built / "_ops.so", *built.glob("_C*.so"))

    def run(code: str, gpu: str | None = None, **environment: object) -> str:
        launches = f"nvcc_kernels({GPUS[gpu].capability if gpu else 80}, gpu={gpu!r})"
        code = f"from ptx_launches import nvcc_kernels\nwith {launches} as launches:\n {code}"
        variables = os.environ | served(tests.parent, **environment)
        call = [sys.executable, "-c", code]
        result = subprocess.run(call, env=variables, cwd=tests, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-5000:]
        return result.stdout

    return run


@needs_nvcc
def test_raw_launchers_on_interpreted_kernels(built: Path, served: Environment, tmp_path: Path) -> None:
    tests = copy_with_library(tmp_path, built / "_ops.so", *built.glob("_C*.so"))
    before = "from ptx_launches import nvcc_kernels\nwith nvcc_kernels(80)"
    run_ops(before, (), tests, ["native_launchers"], **served(tests.parent))


@needs_nvcc
def test_operators_use_stream_and_device_of_torch(printed: Callable[..., str]) -> None:
    """tests/cuda/torch_stand_in.cpp stands in for torch's stream and device guard."""
    code = """if True:
        import ctypes, torch, evakernels
        from evakernels import _native
        runtime = ctypes.CDLL(str(_native._LIBRARY))
        runtime.ptx_last_stream.restype = ctypes.c_void_p
        qkv = [torch.ones(1, 40, 1, 16).bfloat16().requires_grad_() for _ in range(3)]
        for device, stream in ((-1, 0x51), (1, 0x52), (0, None)):
            runtime.ptx_set_device(device)
            runtime.torch_set_stream(ctypes.c_void_p(stream))
            evakernels.rope_attention(*qkv).sum().backward()
            print(runtime.ptx_device(), runtime.ptx_last_device(), runtime.ptx_last_stream())
    """
    found = printed(code, EVAKERNELS_ATTENTION_PLAN="1x2")  # which takes scratch memory
    assert found.split("\n")[:3] == ["-1 0 81", "1 0 82", "0 0 None"]


PLANS = """if True:
    import json, sys, torch
    def record(kernel, sizes, params, shared):
        launches.launches += 1
        found.append((kernel.name, *sizes, shared))
        return ""
    launches._launch = record  # the plans alone: nothing runs
    native, result = torch.ops.evakernels_native, {{}}
    for tokens, head_dim, batch in {calls}:
        found = []
        qkv = [torch.empty(1, tokens, 16, head_dim, dtype=torch.bfloat16).expand(batch, -1, -1, -1) for _ in range(3)]
        options = None, None, None, 0, False, True, 1.0
        out, lse = native.rope_attention_forward(*qkv, *options)
        native.rope_attention_backward(out, *qkv, out, lse, *options)
        result[f"{{tokens}} {{head_dim}} {{batch}}"] = found
    print(json.dumps(result))
"""


def resident_warps(gpu: str, name: str, block: Sequence[int], shared: int) -> int:
    """Resident warps of a multiprocessor, by the registers in the budget."""
    registers = budget.registers_of(f"sm_{GPUS[gpu].capability}")(name)
    return block[0] // 32 * GPUS[gpu].resident_blocks(block[0], registers, shared)


@needs_nvcc
@pytest.mark.parametrize("gpu", ["a100", "h100", "b200"])
def test_attention_plans_fill_multiprocessors(printed: Callable[..., str], gpu: str) -> None:
    """Registers allow eight warps, or twelve in some forward kernels."""
    calls = [(tokens, head_dim, 32) for tokens in (257, 577) for head_dim in (64, 88, 112, 128)]
    for key, launches in json.loads(printed(PLANS.format(calls=calls), gpu=gpu)).items():
        (forward, _, *of_forward), (backward, grid, *of_backward) = launches
        assert resident_warps(gpu, forward, *of_forward) >= 8, (key, launches)
        assert resident_warps(gpu, backward, *of_backward) >= 7, (key, launches)
        assert grid == [32 * 16, 1, 1], (key, launches)


@needs_nvcc
def test_attention_of_few_heads_is_split(printed: Callable[..., str]) -> None:
    """Sixteen heads fill neither pass of an H100; a second kernel of backward then adds dq."""
    code = PLANS.format(calls=[(257, 64, 1), (1025, 128, 1)])
    for launches in json.loads(printed(code, gpu="h100")).values():
        forward, backward, dq = launches
        assert forward[1][0] >= 2 * 16
        assert backward[1][0] >= 2 * 16
        assert "sum_dq" in dq[0]


@needs_nvcc
@pytest.mark.parametrize("gpu", ["a100", "h100", "b200"])
def test_padded_swiglu_runs_the_plan_of_cards(printed: Callable[..., str], gpu: str) -> None:
    """The kernels and blocks that 64 images of 257 tokens take run on five rows of 2,730 channels in 5,504 bytes."""
    code = """if True:
        import torch
        native, run, plans = torch.ops.evakernels_native, launches._launch, []
        def record(kernel, sizes, params, shared):
            plans[-1].append((kernel.name, sizes[1], shared))
            return run(kernel, sizes, params, shared) if rows == 5 else ""
        launches._launch = record
        weight, bias = torch.ones(2752), torch.zeros(2752)
        weight[2730:] = 0
        for rows in (5, 64 * 257):
            plans.append([])
            packed = torch.empty(rows, 2, 2752, dtype=torch.bfloat16)
            if rows == 5:
                packed.normal_()[..., 2730:] = 0
            gate, up = packed.unbind(1)
            out, mean, rstd = native.swiglu_forward(gate, up, weight, bias, 1e-6, 22)
            native.swiglu_backward(gate, gate, up, weight, mean, rstd, [True, True], 22)
            if rows == 5:
                hidden = (torch.nn.functional.silu(gate.float()) * up)[:, :2730]
                expected = torch.nn.functional.layer_norm(hidden, [2730], eps=1e-6)
                torch.testing.assert_close(out[:, :2730].float(), expected, rtol=0.01, atol=0.01)
                assert not out[:, 2730:].any()
        assert plans[0]
        assert plans[0] == plans[1], plans
    """
    printed(code, gpu=gpu)


@needs_nvcc
def test_failed_occupancy_query_is_named(printed: Callable[..., str]) -> None:
    """Attention, norms and GELU plan by resident blocks."""
    code = """if True:
        import torch, evakernels
        x, q = torch.ones(2, 8, requires_grad=True), torch.ones(1, 4, 1, 8).bfloat16()
        normed, gated = evakernels.layer_norm(x), evakernels.swiglu(x, x, torch.ones(8))
        launches._registers = lambda kernel: 1 << 20  # no block fits
        calls = normed.sum().backward, gated.sum().backward, lambda: evakernels.gelu(x)
        for call in (*calls, lambda: evakernels.rope_attention(q, q, q)):
            try:
                call()
            except RuntimeError as error:
                print("occupancy" in str(error))
    """
    assert printed(code, gpu="h100").split() == ["True"] * 4


@needs_nvcc
@pytest.mark.parametrize(
    ("shape", "rotated", "kb"), [((1, 1025, 1, 64), True, 99), ((1, 145, 6, 16), False, 163)], ids=["most", "rounds"]
)
def test_attention_many_tokens_accuracy(
    printed: Callable[..., str], shape: tuple[int, ...], rotated: bool, kb: int
) -> None:
    """A rotated image of 32 x 32 patches, with many stages and blocks per head; and heads that fill the GPU, so that a
    warp processes queries in two rounds."""
    code = f"""if True:
        import torch, evakernels
        from op_checks import error
        from test_rope_attention import attention
        qkv = [torch.randn({shape}, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)]
        tables = (*evakernels.nn.axial_rope(32, 32, head_dim=64), None, 1) if {rotated} else ()
        exact = attention(*(t.double() for t in qkv), *tables)
        ours, torchs = evakernels.rope_attention(*qkv, *tables[:2], num_prefix=int({rotated})), attention(*qkv, *tables)
        print(error(ours, exact), error(torchs, exact), exact.abs().max().item())
    """
    ours, torchs, largest = map(float, printed(code, PTX_SHARED_KB=kb).split())
    assert ours <= 2 * torchs + 2**-8 * largest


@needs_nvcc
def test_long_backward_fits_99_kb_shared_memory(printed: Callable[..., str]) -> None:
    """max_seqlen determines the shared memory; the sequences themselves are short."""
    code = """if True:
        import torch, evakernels
        offsets = torch.arange(0, 1537, 64)
        qkv = [torch.randn(1536, 1, 128).bfloat16().requires_grad_() for _ in range(3)]
        def gradients(backend):
            with evakernels.use_backend(backend):
                out = evakernels.packed_attention(*qkv, offsets, max_seqlen=1536)
                return torch.autograd.grad(out, qkv, torch.ones_like(out))
        for ours, theirs in zip(gradients("cpu"), gradients("reference")):
            print((ours - theirs).abs().max().item() <= 2**-6 * theirs.abs().max().item())
    """
    assert printed(code, PTX_SHARED_KB=99).split() == ["True"] * 3


@needs_nvcc
def test_kernel_rejects_wrong_indices(printed: Callable[..., str]) -> None:
    """Wrong indices of patches and of rotations, and wrong cu_seqlens: only the kernels see them on a GPU."""
    code = """if True:
        import torch, evakernels
        native = torch.ops.evakernels_native
        patches, index = torch.ones(2, 6, 4), torch.tensor([[0, 1], [5, 6]])
        q = torch.ones(5, 1, 8).half()
        calls = [
            lambda: native.token_dropout_forward(patches, index, None, None),
            lambda: native.token_dropout_forward(patches.mT.contiguous().mT, index, None, None),
        ]
        for offsets, longest in (([0, 6], 6), ([0, 4, 2], 4), ([-1, 2], 3), ([0, 5], 4)):
            arguments = (q, q, q, torch.tensor(offsets), None, None, None, longest, True, True, 1.0)
            calls.append(lambda arguments=arguments: native.packed_attention_forward(*arguments))
        tables, one = (torch.ones(7, 4), torch.zeros(7, 4)), q[None]
        for wrong in (-2, 7):
            rows = torch.tensor([0, -1, 6, 3, wrong])
            arguments = (q, q, q, torch.tensor([0, 2, 5]), *tables, rows, 5, True, True, 1.0)
            calls.append(lambda arguments=arguments: native.packed_attention_forward(*arguments))
            arguments = (one, one, one, *tables, rows[None], 0, False, True, 1.0)
            calls.append(lambda arguments=arguments: native.rope_attention_forward(*arguments))
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                print(error)
    """
    lines = [line for line in printed(code).splitlines() if "CUDA error" in line]  # what it says first
    ops = ["token_dropout"] * 2 + ["packed_attention"] * 4 + ["packed_attention", "rope_attention"] * 2
    assert [line.split(" at ")[0] for line in lines] == [f"{op}_forward: CUDA error: trap" for op in ops]
    assert all("token_index is out of range" in line for line in lines[:2])


# --- the launchers on buffers without spare memory ------------------------------------------------------------------


@pytest.fixture
def complaint(built: Path, served: Environment, tmp_path: Path) -> Callable[..., str]:
    """The error output of tests/cuda/drive.py on a library; "" on success."""

    def run(library: Path, capability: int, *families: str, **environment: str) -> str:
        tests = copy_with_library(tmp_path, library, *built.glob("_C*.so"))
        command = [sys.executable, ROOT / "tests/cuda/drive.py", "--interpret", str(capability), *families]
        variables = os.environ | served(tests.parent, **environment)
        result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600, check=False)
        return "" if result.returncode == 0 else f"exit code {result.returncode}: {result.stdout}{result.stderr}"

    return run


@needs_nvcc
@pytest.mark.parametrize("capability", SHARED_KB)
def test_launchers_pass(built: Path, complaint: Callable[..., str], capability: int) -> None:
    assert complaint(built / "_ops.so", capability) == ""


@pytest.fixture(scope="module")
def planted(built: Path, made_once: Callable[..., Path]) -> Path:
    """The library with all faults."""
    return made_once("ptx-planted", build_planted) / "_ops.so"


@needs_nvcc
@pytest.mark.xdist_group("planted ptx")
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_reported(planted: Path, complaint: Callable[..., str], name: str) -> None:
    report = complaint(planted, 80, family_of(units()[name]), **{REQUESTED: str(NUMBERS[name])})
    assert FAULTS[name].report in report, report


# --- Triton --------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("capability", TRITON)
def test_triton_ops(served: Environment, capability: int, family: str) -> None:
    before = f"from ptx_launches import triton_kernels\nwith triton_kernels({capability})"
    kernels, options = TRITON[capability], ()
    if family in ("adamw", "lamb"):
        # These tests select the backend themselves and skip calls that it refuses.
        kernels, options = OPTIMIZERS[capability], ("--backend", "triton")
    run_ops(before, kernels, ops=FILES.get(family, [family]), options=options, **served())


WITHOUT_MASK = """
import torch, triton
from triton import language as tl

@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, 2 * tl.load(x + i{mask}), i < n)

def test_double():
    x = torch.ones(100)
    y = torch.empty_like(x)
    double[(1,)](x, y, 100, BLOCK=128)
    assert (y == 2).all()
"""


@needs_triton
@pytest.mark.parametrize("mask", ["", ", i < n"])
def test_interpreted_gpu_plugin_knows_bounds(tmp_path: Path, mask: str) -> None:
    """The command of CONTRIBUTING.md for Triton kernels."""
    (tmp_path / "test_double.py").write_text(WITHOUT_MASK.format(mask=mask))
    paths = os.pathsep.join([str(ROOT / "tests/evakernels"), str(ROOT)])
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "interpreted_gpu", "test_double.py"]
    environment = os.environ | {"PYTHONPATH": paths}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == (not mask), result.stdout + result.stderr
    # How many of the 28 accesses are found depends on what the heap has behind the tensor.
    assert ("out of bounds" in result.stdout) == (not mask), result.stdout


@needs_triton
def test_triton_wrong_index_gives_nan() -> None:
    """Rows of a wrong index aren't loaded."""
    code = """if True:
        import torch
        from benchmarks.audit.count import launch_of, served, spans_of
        from evakernels.triton import launcher
        patches = torch.ones(2, 4, 8)
        with served("sm_90", "triton") as reports:
            for wrong in (-1, 4):
                reports.clear()
                index = torch.tensor([[0, 3], [1, wrong]])
                out = launcher("token_dropout_forward")(patches, index, None, torch.ones(4, 8))
                (launch,) = (launch_of(report, spans_of({"patches": [patches]})) for report in reports)
                assert out[1, 1].isnan().all() and out.isnan().sum() == 8
                assert launch.loads["patches"].touched == 3  # each row is a sector of 32 bytes
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@needs_triton
def test_unrotated_token_around_a_tile_is_cheap() -> None:
    """A token before whole tiles costs no row and column of tiles."""
    code = """if True:
        import evakernels, torch
        from benchmarks.audit.count import served
        instructions = {}
        with served("sm_90", "triton") as reports:
            for tokens in (128, 129):
                q = torch.ones(1, tokens, 1, 64).bfloat16()
                reports.clear()
                evakernels.rope_attention(q, q, q)
                instructions[tokens] = sum(report.lines().total() for report in reports)
        assert instructions[129] < 2.2 * instructions[128], instructions
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@needs_triton
@pytest.mark.parametrize("on_device", [False, True])
def test_lamb_launches_hold_no_rate_on_device(on_device: bool) -> None:
    """A captured graph keeps the arguments of its launches, and the numbers that it copies to the device."""
    code = f"""if True:
        import struct, torch, evakernels
        from ptx_interpreter.triton_driver import Driver
        rate = 0.3203125  # the same in float32
        arguments = []
        class Recorder(Driver):
            def _launch(self, kernel, grid, threads, params, shared):
                arguments.append(params)
                super()._launch(kernel, grid, threads, params, shared)
        evakernels.triton.interpret()
        from evakernels.triton import _tensor_table
        copied = _tensor_table._copied
        def record(host, device):
            arguments.append(host.numpy().tobytes())
            return copied(host, device)
        _tensor_table._copied = record
        lists = [torch.ones(5)], [torch.ones(5)], [torch.zeros(5)], [torch.zeros(5)], [torch.zeros(())]
        lrs = torch.tensor([rate]) if {on_device} else [rate]
        with Recorder(80) as driver, evakernels.use_backend("triton"):
            evakernels.lamb_step(*lists, lrs, [0.0], betas=(0.9, 0.99), eps=1e-6)
        assert driver.launches == 5
        print(any(struct.pack(kind, rate) in kept for kept in arguments for kind in ("<d", "<f")))
    """
    call = [sys.executable, "-c", code]
    result = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(not on_device)]
