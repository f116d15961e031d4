"""The operations: what they compute, what they cost, and on which shapes. Their peers: test_bench_cases_peers.py."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_case_checks import (
    ATTENTION,
    CASES,
    IN_FLOAT64,
    OPERATIONS,
    TOLERANCE,
    assert_exact,
    draw,
    gradients,
    outputs,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

import evakernels
from benchmarks.accuracy import tensors
from benchmarks.cases.packed_attention import lengths_of
from benchmarks.operation import get_operation, operations
from benchmarks.shapes import parse_shape

pytestmark = pytest.mark.usefixtures("few_parameters")

PACKED, PACKED_SHAPE = get_operation("packed_attention"), parse_shape("tiny:text b5")


# --- what they compute ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [(*case, dtype) for case in CASES for dtype in TOLERANCE if dtype != torch.float64 or case[0] in IN_FLOAT64],
)
@pytest.mark.parametrize("who", ["ours", "eager"])
def test_ours_and_eager_agree_with_float64(name: str, shape: str, who: str, dtype: torch.dtype) -> None:
    op = get_operation(name)
    assert_exact(op, getattr(op, who), parse_shape(shape), dtype)


def test_qkv_are_views_of_one_projection() -> None:
    op = get_operation("rope_attention")
    packed, separate = (draw(op, parse_shape(name)) for name in ("eva01-b16@32 b1", "eva02-b16@32 b1"))
    assert len({packed[name].untyped_storage().data_ptr() for name in "qkv"}) == 1
    assert packed["k"].stride() == (5 * 3 * 768, 3 * 768, 64, 1)
    assert all(separate[name].is_contiguous() for name in "qkv")
    text = draw(get_operation("causal_attention"), parse_shape("eva02-b16:text b1"))
    assert text["v"].stride() == (77 * 3 * 512, 3 * 512, 64, 1)


def test_the_class_token_is_not_rotated() -> None:
    """Angles of a half turn change the sign of every patch of q and k: only the scores of the class token notice."""
    op, shape = get_operation("rope_attention"), parse_shape("tiny b1")
    inputs = draw(op, shape, torch.float64)
    half_turn = {"cos": torch.full_like(inputs["cos"], -1), "sin": torch.zeros_like(inputs["sin"])}
    q, k = (torch.cat((inputs[name][:, :1], -inputs[name][:, 1:]), 1).transpose(1, 2) for name in "qk")
    expected = F.scaled_dot_product_attention(q, k, inputs["v"].transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(op.eager(**(inputs | half_turn)), expected)


def test_mlp_is_the_module_of_the_library() -> None:
    op, shape = get_operation("swiglu_mlp"), parse_shape("tiny b2")
    inputs = draw(op, shape)
    module = evakernels.nn.SwiGLU(shape.width, shape.hidden)
    state = {"ffn_ln.weight": inputs["norm_weight"], "ffn_ln.bias": inputs["norm_bias"]}
    for number in "123":
        state |= {f"w{number}.weight": inputs[f"w{number}"], f"w{number}.bias": inputs[f"b{number}"]}
    module.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(op.ours(**inputs), module(inputs["x"]), rtol=0, atol=0)


# --- what they cost -------------------------------------------------------------------------------------------------


def _counted(function: Callable[[], object]) -> int:
    """FLOPs that torch counts. The counter doesn't know attention on a CPU, so it sees the products written out."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if case[0] != "packed_attention"])
def test_flops_are_torchs_count(name: str, shape: str) -> None:
    """Of matrix products."""
    op, sizes = get_operation(name), parse_shape(shape)
    inputs, work = draw(op, sizes), op.work(sizes, 4)
    # With gradients switched on: without them, the text tower's attention is one op that the counter doesn't know.
    for values in inputs.get("parameters", ()):
        values.requires_grad_()
    forward = _counted(lambda: op.eager(**inputs))
    backward = _counted(lambda: gradients(op, op.eager, inputs)) - forward if work.backward else None
    if name in ATTENTION:  # backward as in torch's own fused kernels, which compute the scores once more
        backward = sdpa_backward_flop_count(*[(sizes.batch, sizes.heads, sizes.tokens, sizes.head_dim)] * 4)
    seen = 0.5 if name == "causal_attention" else 1  # the counter takes the whole square
    assert work.forward.flops == seen * forward
    if work.backward is not None:
        assert work.backward.flops == seen * backward


def test_query_sees_half_of_its_captions_keys() -> None:
    work = PACKED.work(PACKED_SHAPE, 2)
    squares = sum(length**2 for length in lengths_of(PACKED_SHAPE).tolist())
    product = squares * PACKED_SHAPE.heads * PACKED_SHAPE.head_dim
    assert (work.forward.flops, work.backward.flops) == (2 * product, 5 * product)


def _bytes(value: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_bytes_are_inputs_and_outputs(name: str, shape: str, dtype: torch.dtype) -> None:
    op, sizes, traffic = get_operation(name), parse_shape(shape), OPERATIONS[name]
    inputs, work = draw(op, sizes, dtype), op.work(sizes, dtype.itemsize)
    held = {key: _bytes(value) for key, value in inputs.items() if key not in traffic.negligible}
    written = sum(held[key] for key in op.gradients if key in held)
    if name in ("encode_text", "clip_step"):  # of the token embedding, a row for each token of the captions is read
        rows, width = 49408 - sizes.batch * 16, 128
        held["parameters"] -= rows * width * inputs["parameters"][0].itemsize
    if name == "token_dropout":  # the other patches aren't read
        held["patches"] = held["patches"] * sizes.kept_patches // sizes.patches
    held["out"] = _bytes(outputs(op.eager, inputs)) if traffic.outputs else 0
    assert work.forward.bytes == sum(held.values()) + sum(held[key] for key in traffic.written)
    if work.backward is not None:
        read_back = inputs.keys() & held.keys() if traffic.read_back is None else traffic.read_back
        assert work.backward.bytes == held["out"] + sum(held[key] for key in read_back) + written


@pytest.mark.parametrize("name", [name for name, traffic in OPERATIONS.items() if traffic.negligible])
def test_uncounted_inputs_are_negligible(name: str) -> None:
    op, traffic = get_operation(name), OPERATIONS[name]
    for shape in map(parse_shape, op.shapes["cpu"]):
        inputs = draw(op, shape)
        left_out = sum(_bytes(inputs[key]) for key in traffic.negligible)
        assert left_out <= traffic.share * op.work(shape, 4).forward.bytes, shape.name


# --- shapes ---------------------------------------------------------------------------------------------------------


def test_every_operation_has_a_formula_test():
    norms, others = {"layer_norm", "add_layer_norm", "layer_norm_add"}, {"dropin", "dropin_frozen", "loader"}
    assert set(operations()) == set(OPERATIONS) | norms | others


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if get_operation(case[0]).raw])
def test_listed_inputs_are_the_arguments(name: str, shape: str) -> None:
    op = get_operation(name)
    assert set(draw(op, parse_shape(shape))) == set(signature(op.eager).parameters)
