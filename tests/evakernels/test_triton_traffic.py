"""What the Triton kernels read and write, counted in the interpreter: every element of an activation once."""

import pytest
import torch

from evakernels import backends, tuning
from evakernels.triton import FAMILIES, INTERPRETED, launcher
from evakernels.tuning import calls

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter, started by test_triton_kernels.py"),
]

OPS = [op for family in ("layer_norm", "swiglu", "token_dropout") for op in FAMILIES[family]]
ROWS = 30


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """5 samples of 6 rows of 768, or of 682 for swiglu."""
    monkeypatch.setattr(calls, "BATCH", 5)
    monkeypatch.setattr(calls, "ELEMENTS", ROWS * 768)


def launches_of(op, arguments):
    from evakernels.triton._counting import counting

    with counting() as launches:
        outputs = launcher(op)(*arguments)
    return launches, outputs


def calls_of(op, dtype=torch.bfloat16):
    return list(calls.calls(op, {"width": 1024}, calls.Draw("cpu", dtype)))


@pytest.mark.parametrize("op", OPS)
def test_every_element_of_an_activation_is_loaded_and_stored_once(op):
    for arguments in calls_of(op):
        launches, outputs = launches_of(op, arguments)
        (launch,) = launches
        activations = [t for t in (*arguments, *outputs) if isinstance(t, torch.Tensor) and t.numel() > ROWS * 300]
        least = min(t.nbytes for t in activations)
        for name, traffic in launch.tensors.items():
            assert traffic.stored == traffic.stored_once, (op, name)
            if traffic.loaded >= least and not name.startswith("pos_embed"):  # read by every sample
                assert traffic.loaded == traffic.loaded_once, (op, name)


@pytest.mark.parametrize("op", OPS)
def test_traffic_is_that_of_inputs_and_outputs(op):
    """Each read and written once; beside them only the partial sums of the programs, one row each."""
    for arguments in calls_of(op):
        launches, outputs = launches_of(op, arguments)
        (launch,) = launches
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        partial = sum(t.stored for name, t in launch.tensors.items() if is_partial(op, name))
        expected = needed(op, arguments) + sum(t.nbytes for t in outputs if not is_sum(op, t)) + partial
        assert launch.bytes_once == expected, op
        assert partial <= 3 * 4 * launch.programs * 768


def is_partial(op, name):
    return op.endswith("backward") and "token" not in op and name.startswith(("dweight", "dbias", "dlayer_scale"))


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
def test_parameters_are_loaded_once_a_tile(op):
    arguments = calls_of(op)[0]
    (launch,), _ = launches_of(op, arguments)
    tiles = -(-ROWS // tuning.config(op, {"width": 1024}, arguments[0])["ROWS"])
    for name in ("weight", "bias", "layer_scale"):
        if name in launch.tensors:
            assert launch.tensors[name].loaded <= tiles * launch.tensors[name].loaded_once


@pytest.mark.parametrize("op", [op for op in FAMILIES["contrastive"] if op != "siglip_backward"])
def test_contrastive_kernels_make_the_logits_once_and_store_their_gradients_alone(op, monkeypatch):
    monkeypatch.setattr(calls, "PAIRS", 256)
    (arguments,) = calls.calls(op, {"depth": 128}, calls.Draw("cpu", torch.bfloat16))
    launches, _ = launches_of(op, arguments)
    assert sum(launch.flops for launch in launches) == (0 if op == "contrastive_kept_backward" else 2 * 256 * 256 * 128)
    matrices = {
        name: [getattr(launch.tensors[name], way) for launch in launches if name in launch.tensors]
        for name, way in (("dlogits", "stored"), ("kept", "stored" if op.endswith("forward") else "loaded"))
    }
    writes_gradients = op in ("contrastive_backward", "contrastive_kept_backward", "siglip_forward")
    assert sum(matrices["dlogits"]) == (2 * 256 * 256 if writes_gradients else 0)
    assert sum(matrices["kept"]) == (4 * 256 * 256 if "kept" in op else 0)
    # Forward: of each tile a pair of numbers a row and a column, and what they add up to.
    tiles, chunks = 256 // 128, 2
    stored = sum(launch.stored for launch in launches) - sum(matrices["dlogits"])
    stored -= sum(matrices["kept"]) if op.endswith("forward") else 0
    assert stored <= 8 * 256 * (2 * tiles + chunks + 2) + 4 * 256


@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_index_out_of_range_reads_nothing_and_gives_nan(wrong):
    patches, token_index = torch.ones(2, 4, 8), torch.tensor([[0, 3], [1, wrong]])
    (launch,), out = launches_of("token_dropout_forward", (patches, token_index, None, torch.ones(4, 8)))
    assert out[1, 1].isnan().all()
    assert out.isnan().sum() == 8
    assert launch.tensors["patches"].loaded == 3 * 8 * 4


def test_rows_that_registers_dont_hold_are_refused_with_a_reason():
    def why_not(op, width, *rest):
        return backends.why_not(op, "triton", torch.empty(1, width), *rest)

    assert why_not("layer_norm_forward", 8193) == ["rows of 8193 channels are longer than 8192"]
    gate, weight = torch.empty(1, 4097), torch.empty(4097)
    assert why_not("swiglu_backward", 4097, gate, gate, weight) == ["rows of 4097 channels are longer than 4096"]
    assert why_not("swiglu_backward", 4097, gate, gate, None) == []
    x, scale = torch.empty(1, 5120), torch.empty(5120)
    assert why_not("add_layer_norm_backward", 5120, x, x, x, None, None) == []
    assert why_not("add_layer_norm_backward", 5120, x, x, x, None, scale) == [
        "rows of 5120 channels are longer than 4096"
    ]
    assert why_not("layer_norm_add_backward", 5120, x, None, None, scale) != []


def test_what_lies_outside_of_the_arguments_is_refused():
    import triton
    import triton.language as tl
    from triton.runtime.errors import InterpreterError

    from evakernels.triton._counting import counting

    @triton.jit
    def beyond(pointer):
        tl.load(pointer + tl.arange(0, 8))

    with counting(), pytest.raises(InterpreterError, match="beyond accesses memory outside of its arguments"):
        beyond[(1,)](torch.zeros(7))


def test_matrix_products_are_counted():
    import triton
    import triton.language as tl

    from evakernels.triton._counting import counting

    @triton.jit
    def square(pointer, out, times):
        at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        tile = tl.load(pointer + at)
        for _ in range(times):
            tl.store(out + at, tl.dot(tile, tile))

    with counting() as launches:
        square[(2,)](torch.ones(16, 16), torch.empty(16, 16), 3)
    assert launches[0].products == {(16, 16, 16): 6}
    assert launches[0].flops == 6 * 2 * 16**3
    assert launches[0].tensors["out"].stored == 6 * launches[0].tensors["out"].stored_once
