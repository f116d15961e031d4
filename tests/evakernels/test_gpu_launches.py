"""Launches of interpreted GPU kernels: plans for several GPUs, streams, errors; run by test_ptx_kernels.py."""

import ctypes
import os
import struct

import pytest
import torch
import torch.nn.functional as F
from op_checks import error
from test_rope_attention import attention

import evakernels
from benchmarks.audit import budget
from benchmarks.audit.count import launch_of, spans_of
from evakernels import _native
from evakernels.triton import launcher
from ptx_interpreter.gpus import GPUS

native = torch.ops.evakernels_native
small_gpu = pytest.mark.kernels("small gpu")
h100 = pytest.mark.kernels("h100")
every_gpu = pytest.mark.kernels("a100", "h100", "b200")


@pytest.fixture
def plugin(request):
    found = request.config.pluginmanager.get_plugin("interpreted_gpu")
    if found is None:
        pytest.skip("of interpreted kernels")
    return found


@pytest.fixture
def launches(plugin):
    if plugin.launches is None:
        pytest.skip("of nvcc's kernels")
    return plugin.launches


# --- nvcc: plans ----------------------------------------------------------------------------------------------------


@pytest.fixture
def plans(launches, monkeypatch):
    """Name, grid, block and shared memory of each kernel that would be launched; nothing runs."""
    found = []

    def record(kernel, sizes, params, shared):
        launches.launches += 1
        found.append((kernel.name, *sizes, shared))
        return ""

    monkeypatch.setattr(launches, "_launch", record)
    return found


def plan_attention(tokens, head_dim, batch):
    """Plans both passes, of sixteen heads."""
    qkv = [torch.empty(1, tokens, 16, head_dim, dtype=torch.bfloat16).expand(batch, -1, -1, -1) for _ in range(3)]
    options = None, None, None, 0, False, True, 1.0
    out, lse = native.rope_attention_forward(*qkv, *options)
    native.rope_attention_backward(out, *qkv, out, lse, *options)


def resident_warps(name, block, shared):
    """Resident warps of a multiprocessor, by the registers in the budget."""
    gpu = GPUS[os.environ["PTX_GPU"]]
    registers = budget().registers_of(f"sm_{gpu.capability}")(name)
    return block[0] // 32 * gpu.resident_blocks(block[0], registers, shared)


@every_gpu
@pytest.mark.parametrize("tokens", [257, 577])
@pytest.mark.parametrize("head_dim", [64, 88, 112, 128])
def test_attention_plans_fill_multiprocessors(plans, tokens, head_dim):
    """Registers allow eight warps, or twelve in some forward kernels."""
    plan_attention(tokens, head_dim, 32)
    (forward, _, *of_forward), (backward, grid, *of_backward) = plans
    assert resident_warps(forward, *of_forward) >= 8
    assert resident_warps(backward, *of_backward) >= 7
    assert grid == (32 * 16, 1, 1)


@h100
@pytest.mark.parametrize(("tokens", "head_dim"), [(257, 64), (1025, 128)])
def test_attention_of_few_heads_is_split(plans, tokens, head_dim):
    """Sixteen heads fill neither pass of an H100; a second kernel of backward then adds dq."""
    plan_attention(tokens, head_dim, 1)
    forward, backward, dq = plans
    assert forward[1][0] >= 2 * 16
    assert backward[1][0] >= 2 * 16
    assert "sum_dq" in dq[0]


@every_gpu
def test_padded_swiglu_runs_the_plan_of_cards(launches, monkeypatch):
    """The kernels and blocks that 64 images of 257 tokens take run on five rows of 2,730 channels in 5,504 bytes."""
    run, plans = launches._launch, {5: [], 64 * 257: []}

    def record(kernel, sizes, params, shared):
        plans[rows].append((kernel.name, sizes[1], shared))
        return run(kernel, sizes, params, shared) if rows == 5 else ""

    monkeypatch.setattr(launches, "_launch", record)
    weight, bias = F.pad(torch.ones(2730), (0, 22)), torch.zeros(2752)
    for rows in plans:
        gate, up = torch.empty(rows, 2, 2752, dtype=torch.bfloat16).unbind(1)
        if rows == 5:
            gate.copy_(F.pad(torch.randn(rows, 2730), (0, 22)))
            up.copy_(gate.flip(0))
        out, mean, rstd = native.swiglu_forward(gate, up, weight, bias, 1e-6, 22)
        native.swiglu_backward(gate, gate, up, weight, mean, rstd, [True, True], 22)
        if rows == 5:
            expected = F.layer_norm((F.silu(gate.float()) * up)[:, :2730], [2730], eps=1e-6)
            torch.testing.assert_close(out[:, :2730].float(), expected, rtol=0.01, atol=0.01)
            assert not out[:, 2730:].any()
    assert plans[5]
    assert plans[5] == plans[64 * 257]


# --- nvcc: errors, streams, sizes -----------------------------------------------------------------------------------


@h100
def test_failed_occupancy_query_is_named(launches, monkeypatch):
    """Attention, norms and GELU plan by resident blocks."""
    x, q = torch.ones(2, 8, requires_grad=True), torch.ones(1, 4, 1, 8).bfloat16()
    normed, gated = evakernels.layer_norm(x), evakernels.swiglu(x, x, torch.ones(8))
    monkeypatch.setattr(launches, "_registers", lambda kernel: 1 << 20)  # no block fits
    calls = normed.sum().backward, gated.sum().backward, lambda: evakernels.gelu(x)
    for call in (*calls, lambda: evakernels.rope_attention(q, q, q)):
        with pytest.raises(RuntimeError, match="occupancy"):
            call()


@small_gpu
def test_operators_use_stream_and_device_of_torch(launches, monkeypatch):
    """tests/cuda/torch_stand_in.cpp stands in for torch's stream and device guard."""
    monkeypatch.setenv("EVAKERNELS_ATTENTION_PLAN", "1x2")  # which takes scratch memory
    runtime = ctypes.CDLL(str(_native._LIBRARY))
    runtime.ptx_last_stream.restype = ctypes.c_void_p
    qkv = [torch.ones(1, 40, 1, 16).bfloat16().requires_grad_() for _ in range(3)]
    for device, stream, last_device in ((-1, 0x51, 0), (1, 0x52, 0), (0, None, 0)):
        runtime.ptx_set_device(device)
        runtime.torch_set_stream(ctypes.c_void_p(stream))
        evakernels.rope_attention(*qkv).sum().backward()
        assert (runtime.ptx_device(), runtime.ptx_last_device()) == (device, last_device)
        assert runtime.ptx_last_stream() == stream


@small_gpu
def test_attention_many_tokens_accuracy(launches):
    """A rotated image of 32 x 32 patches, with many stages and blocks per head."""
    qkv = [torch.randn(1, 1025, 1, 64, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)]
    tables = evakernels.nn.axial_rope(32, 32, head_dim=64)
    exact = attention(*(t.double() for t in qkv), *tables, None, 1)
    ours, torchs = evakernels.rope_attention(*qkv, *tables, num_prefix=1), attention(*qkv, *tables, None, 1)
    assert error(ours, exact) <= 2 * error(torchs, exact) + 2**-8 * exact.abs().max()


@small_gpu
def test_long_backward_fits_99_kb_shared_memory(launches):
    """max_seqlen determines the shared memory; the sequences themselves are short."""
    qkv = [torch.randn(1536, 1, 128).bfloat16().requires_grad_() for _ in range(3)]
    results = []
    for backend in ("cpu", "reference"):
        with evakernels.use_backend(backend):
            out = evakernels.packed_attention(*qkv, torch.arange(0, 1537, 64), max_seqlen=1536)
            results.append(torch.autograd.grad(out, qkv, torch.ones_like(out)))
    for ours, theirs in zip(*results, strict=True):
        assert error(ours, theirs) <= 2**-6 * theirs.abs().max()


PATCHES, INDEX, Q = torch.ones(2, 6, 4), torch.tensor([[0, 1], [5, 6]]), torch.ones(5, 1, 8).half()
TABLES = torch.ones(7, 4), torch.zeros(7, 4)


def packed(offsets, longest, *table):
    table = table or (None, None, None)
    native.packed_attention_forward(Q, Q, Q, torch.tensor(offsets), *table, longest, True, True, 1.0)


@small_gpu
@pytest.mark.parametrize("layout", [PATCHES, PATCHES.mT.contiguous().mT])
def test_kernel_rejects_wrong_token_index(launches, layout):
    with pytest.raises(RuntimeError, match=r"token_dropout_forward: CUDA error: trap at .*token_index is out of range"):
        native.token_dropout_forward(layout, INDEX, None, None)


@small_gpu
@pytest.mark.parametrize(("offsets", "longest"), [([0, 6], 6), ([0, 4, 2], 4), ([-1, 2], 3), ([0, 5], 4)])
def test_kernel_rejects_wrong_cu_seqlens(launches, offsets, longest):
    """Only the kernels see them on a GPU."""
    with pytest.raises(RuntimeError, match="packed_attention_forward: CUDA error: trap at"):
        packed(offsets, longest)


@small_gpu
@pytest.mark.parametrize("wrong", [-2, 7])
def test_kernel_rejects_wrong_rotation_index(launches, wrong):
    rows, q = torch.tensor([0, -1, 6, 3, wrong]), Q[None]
    with pytest.raises(RuntimeError, match="packed_attention_forward: CUDA error: trap at"):
        packed([0, 2, 5], 5, *TABLES, rows)
    with pytest.raises(RuntimeError, match="rope_attention_forward: CUDA error: trap at"):
        native.rope_attention_forward(q, q, q, *TABLES, rows[None], 0, False, True, 1.0)


# --- Triton ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def driver(plugin, monkeypatch):
    """Triton's driver, which keeps a report of each launch."""
    monkeypatch.setattr(plugin.driver, "reports", [])
    monkeypatch.setattr(plugin.driver, "_options", {"watch": False})
    return plugin.driver


@pytest.mark.parametrize("wrong", [-1, 4])
@pytest.mark.kernels("triton launches")
def test_triton_wrong_index_gives_nan(driver, wrong):
    """Rows of a wrong index aren't loaded."""
    patches = torch.ones(2, 4, 8)
    out = launcher("token_dropout_forward")(patches, torch.tensor([[0, 3], [1, wrong]]), None, torch.ones(4, 8))
    (launch,) = (launch_of(report, spans_of({"patches": [patches]})) for report in driver.reports)
    assert out[1, 1].isnan().all()
    assert out.isnan().sum() == 8
    assert launch.loads["patches"].touched == 3  # each row is a sector of 32 bytes


@pytest.mark.kernels("triton launches")
def test_unrotated_token_around_a_tile_is_cheap(driver):
    """A token before whole tiles costs no row and column of tiles."""
    instructions = []
    for tokens in (128, 129):
        q = torch.ones(1, tokens, 1, 64).bfloat16()
        driver.reports.clear()
        evakernels.rope_attention(q, q, q)
        instructions.append(sum(report.lines().total() for report in driver.reports))
    assert instructions[1] < 2.2 * instructions[0]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.kernels("triton launches")
def test_lamb_launches_hold_no_rate_on_device(driver, monkeypatch, on_device):
    """A captured graph keeps the arguments of its launches, and the numbers that it copies to the device."""
    from evakernels.triton import _tensor_table

    rate, kept = 0.3203125, []  # the same in float32
    copied, launch = _tensor_table._copied, driver._launch

    def record_launch(kernel, grid, threads, params, shared):
        kept.append(params)
        launch(kernel, grid, threads, params, shared)

    def record_copy(host, device):
        kept.append(host.numpy().tobytes())
        return copied(host, device)

    monkeypatch.setattr(driver, "_launch", record_launch)
    monkeypatch.setattr(_tensor_table, "_copied", record_copy)
    lists = [torch.ones(5)], [torch.ones(5)], [torch.zeros(5)], [torch.zeros(5)], [torch.zeros(())]
    lrs = torch.tensor([rate]) if on_device else [rate]
    evakernels.lamb_step(*lists, lrs, [0.0], betas=(0.9, 0.99), eps=1e-6)
    assert len(driver.reports) == 5
    assert on_device != any(struct.pack(kind, rate) in part for part in kept for kind in ("<d", "<f"))
