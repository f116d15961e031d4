"""What the Triton kernels read and write, counted in their PTX: every element of an activation once."""

import inspect
import os

import pytest
import torch

import evakernels
from evakernels import backends, tuning
from evakernels.triton import FAMILIES, launcher
from evakernels.tuning import calls

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif("TRITON_PTX" not in os.environ, reason="started by test_ptx_kernels.py"),
]

OPS = [op for family in ("layer_norm", "swiglu", "token_dropout") for op in FAMILIES[family]]
ROWS = 30
SECTOR = 32


@pytest.fixture(scope="module", autouse=True)
def reports():
    from benchmarks.audit.count import served

    with served("sm_90", "triton") as found:
        yield found


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """5 samples of 6 rows of 768, or of 682 for swiglu."""
    monkeypatch.setattr(calls, "BATCH", 5)
    monkeypatch.setattr(calls, "ELEMENTS", ROWS * 768)


def launches_of(reports, op, arguments):
    """Launches, and outputs; an output's buffer has its place as its name."""
    from benchmarks.audit.count import launch_of, spans_of

    reports.clear()
    outputs = launcher(op)(*arguments)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    tensors = dict(zip(inspect.signature(launcher(op)).parameters, arguments, strict=False))
    tensors |= {str(n): output for n, output in enumerate(outputs)}
    buffers = spans_of({name: [t] for name, t in tensors.items() if isinstance(t, torch.Tensor)})
    return [launch_of(report, buffers) for report in reports], outputs


def calls_of(op, dtype=torch.bfloat16):
    return list(calls.calls(op, {"width": 1024}, calls.Draw("cpu", dtype)))


@pytest.mark.parametrize("op", OPS)
def test_every_element_of_an_activation_is_loaded_and_stored_once(reports, op):
    for arguments in calls_of(op):
        (launch,), outputs = launches_of(reports, op, arguments)
        activations = [t for t in (*arguments, *outputs) if isinstance(t, torch.Tensor) and t.numel() > ROWS * 300]
        least = min(t.nbytes for t in activations)
        for name, traffic in launch.stores.items():
            assert traffic.bytes <= SECTOR * traffic.touched, (op, name)
        for n, output in enumerate(outputs):
            if output.numel() > ROWS * 300:
                assert launch.stores[str(n)].bytes == output.nbytes, (op, n)
        for name, traffic in launch.loads.items():
            if traffic.bytes >= least and not name.startswith("pos_embed"):  # read by every sample
                assert traffic.bytes <= SECTOR * traffic.touched < traffic.bytes + SECTOR, (op, name)


@pytest.mark.parametrize("op", OPS)
def test_traffic_is_that_of_inputs_and_outputs(reports, op):
    """Each read and written once, to whole sectors; beside them only the partial sums of the programs, one row each."""
    for arguments in calls_of(op):
        (launch,), outputs = launches_of(reports, op, arguments)
        results = sum(t.nbytes for t in outputs if not is_sum(op, t))
        stored = sum(traffic.bytes for traffic in launch.stores.values())
        partial = stored - results
        assert 0 <= partial <= 3 * 4 * launch.grid[0] * 768, op
        assert partial == 0 or any(is_sum(op, t) for t in outputs), op
        expected = needed(op, arguments) + results + partial
        tensors = sum(isinstance(t, torch.Tensor) for t in (*arguments, *outputs))
        assert expected <= launch.touched < expected + 2 * SECTOR * tensors, op


def is_sum(op, tensor):
    """Gradients of parameters are added up from the partial sums."""
    return op.endswith("backward") and "token" not in op and tensor.dim() == 1


def needed(op, arguments):
    """Bytes of the inputs; of patches and their position embeddings only those that are kept."""
    tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
    total = sum(t.nbytes for t in tensors)
    if op == "layer_norm_add_backward" and arguments[4] is None and arguments[3] is not None:
        total -= arguments[3].nbytes  # only layer_scale's gradient needs the bias
    if op == "token_dropout_forward" and arguments[1] is not None:
        patches, token_index, *_ = arguments
        total -= patches[0, 0].nbytes * (patches.shape[0] * patches.shape[1] - token_index.numel())
        dropped = patches.shape[1] - token_index.unique().numel()
        total -= dropped * patches[0, 0].nbytes  # position embeddings of tokens that no sample keeps
    if op == "token_dropout_backward" and arguments[1] is not None:
        batch, tokens = arguments[0].shape[0], arguments[3]
        total += 4 * batch * tokens - arguments[1].nbytes  # the places of all tokens in 32 bits, not their index
    return total


@pytest.mark.parametrize("op", [op for op in OPS if op.endswith("backward") and "token" not in op])
def test_parameters_are_loaded_once_a_tile(reports, op):
    arguments = calls_of(op)[0]
    (launch,), _ = launches_of(reports, op, arguments)
    tiles = -(-ROWS // tuning.config(op, {"width": 1024}, arguments[0])["ROWS"])
    for name in ("weight", "bias", "layer_scale"):
        if name in launch.loads:
            assert launch.loads[name].bytes <= tiles * SECTOR * launch.loads[name].touched


@pytest.mark.parametrize("op", [op for op in FAMILIES["contrastive"] if op != "siglip_backward"])
def test_contrastive_kernels_make_the_logits_once_and_store_their_gradients_alone(reports, op, monkeypatch):
    monkeypatch.setattr(calls, "PAIRS", 256)
    (arguments,) = calls.calls(op, {"depth": 128}, calls.Draw("cpu", torch.bfloat16))
    launches, _ = launches_of(reports, op, arguments)
    assert sum(launch.flops for launch in launches) == (0 if op == "contrastive_kept_backward" else 2 * 256 * 256 * 128)
    stored = sum(traffic.bytes for launch in launches for traffic in launch.stores.values())
    writes_gradients = op in ("contrastive_backward", "contrastive_kept_backward", "siglip_forward")
    matrices = 2 * 256 * 256 if writes_gradients else 4 * 256 * 256 if op == "contrastive_kept_forward" else 0
    # Forward: of each tile a pair of numbers a row and a column, and what they add up to.
    tiles, chunks = 256 // 128, 2
    assert matrices <= stored <= matrices + 8 * 256 * (2 * tiles + chunks + 2) + 4 * 256
    if op == "contrastive_kept_backward":
        assert max(traffic.bytes for launch in launches for traffic in launch.loads.values()) == 4 * 256 * 256


OPTIMIZERS = {  # Bytes a parameter: in float32, and with parameters and gradients in bfloat16.
    "adamw_update": {torch.float32: 28, torch.bfloat16: 22},
    "lamb_update": {torch.float32: 24, torch.bfloat16: 20},
    "lamb_apply": {torch.float32: 16, torch.bfloat16: 12},
    "gradient_norm": {torch.float32: 4, torch.bfloat16: 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPTIMIZERS)
def test_optimizers_move_each_buffer_once_and_in_whole_words(reports, op, dtype):
    from benchmarks.audit.count import launch_of, spans_of

    arguments = next(calls.calls(op, {}, calls.Draw("cpu", dtype)))
    lists = [list_ for list_ in arguments if isinstance(list_, list) and list_ and torch.is_tensor(list_[0])]
    large = spans_of({str(n): list_[:1] for n, list_ in enumerate(lists)})
    reports.clear()
    launcher(op)(*arguments)
    launches = [launch_of(report, large) for report in reports]
    count = sum(tensor.numel() for tensor in lists[0])
    assert 1 <= sum(launch.touched for launch in launches) / (OPTIMIZERS[op][dtype] * count) < 1.04
    found = [(name, own) for launch in launches for name, own in [*launch.loads.items(), *launch.stores.items()]]
    found = [(name, own) for name, own in found if name in large and own.requests > 1]  # no counter of steps
    assert len(found) == {"adamw_update": 7, "lamb_update": 6, "lamb_apply": 4, "gradient_norm": 1}[op]
    for name, own in found:
        assert own.bytes == SECTOR * own.touched == SECTOR * own.sectors, name
        assert own.bytes / own.requests in (256, 512), name  # of 32 lanes, four elements each


def test_more_tiles_than_are_merged_at_once_give_the_log_sum_exps(reports):
    from evakernels.triton import contrastive

    generator = torch.Generator().manual_seed(0)
    maxima, sums = 10 * torch.randn(37, 70, generator=generator), torch.rand(37, 70, generator=generator) + 0.5
    maximum, lse = torch.empty(2, 70)
    contrastive._merge(torch.stack([maxima, sums]), maximum, lse, final=True)
    assert torch.equal(maximum, maxima.amax(0))
    torch.testing.assert_close(lse.double(), (maxima.double() + sums.double().log()).logsumexp(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_index_out_of_range_reads_nothing_and_gives_nan(reports, wrong):
    patches, token_index = torch.ones(2, 4, 8), torch.tensor([[0, 3], [1, wrong]])
    (launch,), (out, *_) = launches_of(reports, "token_dropout_forward", (patches, token_index, None, torch.ones(4, 8)))
    assert out[1, 1].isnan().all()
    assert out.isnan().sum() == 8
    assert launch.loads["patches"].touched == 3  # each row is a sector


# 88 channels are multiplied as 128, and the class token's tile of 16 rows in each of several warps.
USEFUL = {
    64: {"forward_kernel": 0.9, "dq_kernel": 0.9, "dkdv_kernel": 0.9},
    88: {"forward_kernel": 0.41, "dq_kernel": 0.37, "dkdv_kernel": 0.41},
}


@pytest.mark.parametrize("head_dim", USEFUL)
def test_a_class_token_costs_no_tiles_of_its_own(reports, head_dim):
    """257 tokens: products of 257 queries with 256 keys, or the other way round, in tiles of 272 by 256. What is
    written is written once."""
    from benchmarks.audit.count import launch_of

    tokens, products = 257, {"forward_kernel": 2, "dq_kernel": 3, "dkdv_kernel": 4}
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, tokens, 3, 1, head_dim, generator=generator).bfloat16().requires_grad_()
    cos, sin = evakernels.nn.axial_rope(16, 16, head_dim, compact=True)
    reports.clear()
    evakernels.rope_attention(*qkv.unbind(2), cos, sin, num_prefix=1).sum().backward()
    launches = [launch_of(report, {}) for report in reports]
    kernels = ["rotate_kernel", "forward_kernel", "rotate_kernel", "dq_kernel", "dkdv_kernel"]
    assert [launch.kernel for launch in launches] == kernels
    made = {launch.kernel: launch.flops for launch in launches if launch.flops}
    useful = {kernel: products[kernel] * 2 * tokens * (tokens - 1) * head_dim / flops for kernel, flops in made.items()}
    print(useful)
    least = USEFUL[head_dim]
    assert {kernel: share for kernel, share in useful.items() if not least[kernel] < share <= 1} == {}, useful
    for launch in launches:
        for traffic in launch.stores.values():
            assert traffic.bytes <= SECTOR * traffic.touched, launch.kernel


def test_rows_that_registers_dont_hold_are_refused_with_a_reason():
    def why_not(op, width, *rest):
        return backends.why_not(op, "triton", torch.empty(1, width), *rest)

    assert why_not("layer_norm_forward", 8193) == ["rows of 8193 channels are longer than 8192"]
    gate, weight = torch.empty(1, 4097), torch.empty(4097)
    for norm_weight, reasons in ((weight, ["rows of 4097 channels are longer than 4096"]), (None, [])):
        assert why_not("swiglu_forward", 4097, gate, norm_weight) == reasons
        assert why_not("swiglu_backward", 4097, gate, gate, norm_weight) == reasons


def test_what_attention_refuses():
    def why_not(head_dim, scale):
        x = torch.ones(1, 2, 1, head_dim)
        return backends.why_not("rope_attention_forward", "triton", x, x, x, None, None, None, 0, False, True, scale)

    assert why_not(128, 1.0) == []
    assert why_not(136, 1.0) == ["head_dim 136 is not one of 1 to 128"]
    assert why_not(64, -1.0) == ["scale -1.0 is not positive"]
