"""The operations: right results of all candidates, cost by formula, and inputs."""

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import pytest
import torch
from bench_fakes import CPU, FakeTimer, draw, machine
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

import benchmarks.cases  # noqa: F401  registers the operations
from benchmarks import accuracy
from benchmarks.accuracy import forward_outputs, gradient_leaves, tensors
from benchmarks.candidates import candidates
from benchmarks.cases.packed_attention import lengths_of
from benchmarks.measure import DTYPES, Case, measure
from benchmarks.operation import Inputs, Operation, get_operation, operations, peers_of
from benchmarks.results import Row
from benchmarks.shapes import parse_shape
from evaclip.errors import UserError

pytestmark = pytest.mark.usefixtures("few_parameters")


class Bytes(NamedTuple):
    """Tensors that the formula of an operation counts.

    Attributes:
        negligible: inputs that it leaves out, at most `share` of the bytes.
        read_back: inputs that the backward pass reads in addition to the gradients of the outputs; None for all.
        written: inputs that are written too.
        outputs: whether the outputs count.
    """

    negligible: tuple[str, ...] = ()
    read_back: tuple[str, ...] | None = None
    written: tuple[str, ...] = ()
    outputs: bool = True
    share: float = 0.04


_QKV, _NORM = ("q", "k", "v", "out"), ("norm_weight", "norm_bias")
_STATE = ("exp_avgs", "exp_avg_sqs", "steps")
OPERATIONS = {
    "rope_attention": Bytes(("cos", "sin", "token_index"), _QKV),
    "causal_attention": Bytes((), _QKV),
    "packed_attention": Bytes(("cu_seqlens",), _QKV),
    "layer_norm": Bytes(("weight", "bias"), ("x",)),
    "gelu": Bytes(("bias",), ("x",)),
    "quick_gelu": Bytes(("bias",), ("x",)),
    "silu_mul": Bytes((), ("gate", "up")),
    "swiglu": Bytes(_NORM, ("gate", "up")),
    "swiglu_mlp": Bytes((*_NORM, "b1", "b2", "b3"), ("x", "w1", "w2", "w3")),
    "token_dropout": Bytes(("token_index",), ()),
    "clip_loss": Bytes(("logit_scale",), outputs=False, share=1e-4),
    "siglip_loss": Bytes(("logit_scale", "logit_bias"), outputs=False, share=1e-4),
    "lamb_step": Bytes(written=_STATE),
    "adamw_step": Bytes(written=_STATE),
    "encode_image": Bytes(),
    "encode_text": Bytes(),
    "clip_step": Bytes(("token_index",), outputs=False, share=1e-4),
}
SMALL = {
    "rope_attention": ("tiny b2", "tiny b2 drop50", "eva01-g14@28 b1"),
    "causal_attention": ("tiny:text b2",),
    "packed_attention": ("tiny:text b5",),
    "token_dropout": ("tiny b2", "tiny b2 drop50"),
    "clip_loss": ("tiny b7",),
    "siglip_loss": ("tiny b7",),
    "encode_image": ("tiny@40 b1",),
    "encode_text": ("tiny:text b2",),
    "clip_step": ("tiny b3", "tiny b2 drop50"),
}
# Both residual adds have one gradient for two inputs, which the rule for bytes doesn't know.
RESIDUAL = ("add_layer_norm", "layer_norm_add")
CASES = [(op, shape) for op in OPERATIONS for shape in SMALL.get(op, ("tiny b2",))]
ROWS = [(name, "small") for name in (*OPERATIONS, *RESIDUAL, "loader", "resize") if get_operation(name).raw]
ENCODERS = ("encode_image", "encode_text")
ENGINES = [peer.name for peer in peers_of("embed") if peer.package in ("torch", "open_clip_torch", "onnxruntime")]
SLOW = ("freezing", "of open_clip")


def measure_case(name: str, shape: str, dtype: str, mode: str = "forward", peers: Any = ()) -> dict[str, Row]:
    """The rows of a case by candidate."""
    op = get_operation(name)
    case = Case(op, op.shape(shape), mode, DTYPES[dtype], CPU)
    measure(case, candidates(op, "cpu", peers=peers)[0], machine(), FakeTimer(), 0)
    return case.rows


# --- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "shape"), [*CASES, *ROWS])
def test_case_has_right_results(name, shape, dtype, monkeypatch):
    """Of this library, plain PyTorch and the peers of a CPU; the arguments of torch.compile are tested uncompiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    # Of few numbers plain PyTorch's error may be small by luck.
    monkeypatch.setattr(accuracy, "ERROR_RULE", dict.fromkeys(accuracy.ERROR_RULE, 20.0))
    for mode in get_operation(name).modes:
        rows = measure_case(name, shape, dtype, mode, ["none"] if name in ENCODERS else ())
        failures = {row.candidate: row.failure.partition(":")[0] for row in rows.values() if row.failure}
        refused = {}
        if "attention" in name and mode == "training" and "FlexAttention" in rows:
            refused = {"FlexAttention": "NotImplementedError"}
        elif name in ("lamb_step", "adamw_step") and dtype == "bfloat16":  # peers have moments in this dtype alone
            refused = {{"lamb_step": "timm", "adamw_step": "torch fused"}[name]: "TypeError"}
        assert failures == refused
        assert rows.keys() >= {get_operation(name).baseline}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_flex_attention_compiles() -> None:
    row = measure_case("causal_attention", "tiny:text b2", "float32", peers=["FlexAttention"])["FlexAttention"]
    assert row.failure is None


def test_varlen_accepts_its_arguments() -> None:
    """On tensors without data: it has no kernel for a CPU."""
    shape = parse_shape("tiny:text b5")
    (peer,) = (peer for peer in peers_of("packed_attention") if peer.name == "torch varlen")
    inputs = draw(get_operation("packed_attention"), shape, torch.bfloat16)
    inputs = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in inputs.items()}
    (out,) = forward_outputs(peer.build(shape), inputs)
    assert out.shape == inputs["q"].shape


@pytest.mark.parametrize(
    "engine",
    [pytest.param(n, marks=[pytest.mark.exhaustive] if any(slow in n for slow in SLOW) else []) for n in ENGINES],
)
def test_image_engine_agrees_with_open_clip(engine: str) -> None:
    row = measure_case("embed", "small", "float32", peers=[engine])[engine]
    assert row.failure is None
    assert (row.error > 1e-4) == (row.kind == "quantized")


def test_text_engines_agree_with_open_clip() -> None:
    rows = measure_case("embed", "tiny:text b2", "float32", peers=["evakernels bf16", "onnxruntime"])
    assert {name: row.failure for name, row in rows.items()} == dict.fromkeys(
        ("evakernels", "open_clip", "evakernels bf16", "onnxruntime")
    )
    assert rows["evakernels"].error < 1e-5 < rows["evakernels bf16"].error


def test_embed_refuses_other_dtypes_of_weights() -> None:
    with pytest.raises(UserError, match="--dtype of embed must be float32"):
        draw(get_operation("embed"), parse_shape("tiny:text b2"), torch.bfloat16)


# --- cost -----------------------------------------------------------------------------------------------------------


def _gradients(op: Operation, inputs: Inputs) -> object:
    leaves = [leaf.requires_grad_() for leaf in gradient_leaves(op, inputs)]
    out = tensors(op.eager(**inputs))
    return torch.autograd.grad(out, leaves, list(map(torch.ones_like, out)))


def _count_flops(function: Callable[[], object]) -> int:
    """Torch's count; it doesn't know attention on a CPU, which the math backend turns into matmuls."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if case[0] != "packed_attention"])
def test_matmul_flops_are_torchs_count(name: str, shape: str) -> None:
    op, sizes = get_operation(name), parse_shape(shape)
    inputs, work = draw(op, sizes), op.work(sizes, 4)
    # With gradients switched on: without them, the text tower's attention is one op that the counter doesn't know.
    for values in inputs.get("parameters", ()):
        values.requires_grad_()
    forward = _count_flops(lambda: op.eager(**inputs))
    backward = _count_flops(lambda: _gradients(op, inputs)) - forward if work.backward else None
    if name in ("rope_attention", "causal_attention"):  # as in torch's fused kernels, which compute the scores again
        backward = sdpa_backward_flop_count(*[(sizes.batch, sizes.heads, sizes.tokens, sizes.head_dim)] * 4)
    seen = 0.5 if name == "causal_attention" else 1  # the counter takes the whole square
    assert work.forward.flops == seen * forward
    if work.backward is not None:
        assert work.backward.flops == seen * backward


def test_packed_query_sees_half_of_its_caption() -> None:
    shape = parse_shape("tiny:text b5")
    work = get_operation("packed_attention").work(shape, 2)
    product = sum(length**2 for length in lengths_of(shape).tolist()) * shape.heads * shape.head_dim
    assert (work.forward.flops, work.backward.flops) == (2 * product, 5 * product)


def _bytes(value: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors(value))


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_bytes_are_inputs_and_outputs(name: str, shape: str) -> None:
    op, sizes, counted = get_operation(name), parse_shape(shape), OPERATIONS[name]
    inputs, work = draw(op, sizes, torch.bfloat16), op.work(sizes, 2)
    held = {key: _bytes(value) for key, value in inputs.items() if key not in counted.negligible}
    written = sum(held[key] for key in op.gradients if key in held)
    if name in ("encode_text", "clip_step"):  # of the token embedding, a row for each token of the captions is read
        rows, width = 49408 - sizes.batch * 16, 128
        held["parameters"] -= rows * width * inputs["parameters"][0].itemsize
    if name == "token_dropout":  # the other patches aren't read
        held["patches"] = held["patches"] * sizes.kept_patches // sizes.patches
    held["out"] = _bytes(forward_outputs(op.eager, inputs)) if counted.outputs else 0
    assert work.forward.bytes == sum(held.values()) + sum(held[key] for key in counted.written)
    if work.backward is not None:
        read_back = inputs.keys() & held.keys() if counted.read_back is None else counted.read_back
        assert work.backward.bytes == held["out"] + sum(held[key] for key in read_back) + written


@pytest.mark.parametrize("name", [name for name, counted in OPERATIONS.items() if counted.negligible])
def test_uncounted_inputs_are_negligible(name: str) -> None:
    op, counted = get_operation(name), OPERATIONS[name]
    for shape in map(parse_shape, op.shapes["cpu"]):
        inputs = draw(op, shape)
        left_out = sum(_bytes(inputs[key]) for key in counted.negligible)
        assert left_out <= counted.share * op.work(shape, 4).forward.bytes, shape.name


# --- inputs ---------------------------------------------------------------------------------------------------------


def test_every_operation_has_a_formula_test():
    assert set(operations()) == {*OPERATIONS, *RESIDUAL, "dropin", "dropin_frozen", "embed", "loader", "resize"}


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if get_operation(case[0]).raw])
def test_listed_inputs_are_the_arguments(name: str, shape: str) -> None:
    op = get_operation(name)
    assert set(draw(op, parse_shape(shape))) == set(signature(op.eager).parameters)


def test_qkv_are_views_of_one_projection() -> None:
    op = get_operation("rope_attention")
    packed, separate = (draw(op, parse_shape(name)) for name in ("eva01-b16@32 b1", "eva02-b16@32 b1"))
    assert len({packed[name].untyped_storage().data_ptr() for name in "qkv"}) == 1
    assert packed["k"].stride() == (5 * 3 * 768, 3 * 768, 64, 1)
    assert all(separate[name].is_contiguous() for name in "qkv")
