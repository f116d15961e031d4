"""The operations: right results of all candidates, and FLOPs as torch counts them."""

from collections.abc import Callable
from typing import Any

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
from benchmarks.measure import DTYPES, Case, measure
from benchmarks.operation import Inputs, Operation, get_operation, operations, peers_of
from benchmarks.results import Row
from benchmarks.shapes import parse_shape
from evaclip.errors import UserError

pytestmark = pytest.mark.usefixtures("few_parameters")


OPERATIONS = (
    *("rope_attention", "causal_attention", "packed_attention", "layer_norm", "gelu", "quick_gelu", "silu_mul"),
    *("swiglu", "swiglu_mlp", "token_dropout", "clip_loss", "siglip_loss", "lamb_step", "adamw_step"),
    *("encode_image", "encode_text", "clip_step"),
)
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


def test_every_operation_has_a_case():
    assert set(operations()) == {*OPERATIONS, *RESIDUAL, "dropin", "dropin_frozen", "embed", "loader", "resize"}
