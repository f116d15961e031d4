"""The operations of attention, SwiGLU and token dropout: what they compute, what they cost, and who is compared."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from bench_case_checks import TOLERANCE, assert_exact, build, draw, gradients, outputs, pretend_installed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

import evakernels
from benchmarks.accuracy import relative_error
from benchmarks.cases import rope_attention
from benchmarks.operation import Outputs, get_operation, peers_of
from benchmarks.shapes import parse_shape
from evaclip.errors import UserError

ATTENTION = ("rope_attention", "causal_attention")


class Traffic(NamedTuple):
    """What the formulas leave out, and what the backward pass reads beside the gradients of the outputs."""

    negligible: tuple[str, ...] = ()
    read_back: tuple[str, ...] = ()


OPERATIONS = {
    "rope_attention": Traffic(("cos", "sin", "token_index"), ("q", "k", "v", "out")),
    "causal_attention": Traffic((), ("q", "k", "v", "out")),
    "gelu": Traffic(("bias",), ("x",)),
    "silu_mul": Traffic((), ("gate", "up")),
    "swiglu": Traffic(("norm_weight", "norm_bias"), ("gate", "up")),
    "swiglu_mlp": Traffic(("norm_weight", "norm_bias", "b1", "b2", "b3"), ("x", "w1", "w2", "w3")),
    "token_dropout": Traffic(("token_index",), ()),
}
SMALL = {
    "rope_attention": ("tiny b2", "tiny b2 drop50", "eva01-g14@28 b1"),
    "causal_attention": ("tiny:text b2",),
    "token_dropout": ("tiny b2", "tiny b2 drop50"),
}
CASES = [(op, shape) for op in OPERATIONS for shape in SMALL.get(op, ("tiny b2",))]


# --- what they compute ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("who", ["ours", "eager"])
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_ours_and_plain_torch_agree_with_float64(name: str, shape: str, who: str, dtype: torch.dtype) -> None:
    op = get_operation(name)
    assert_exact(op, getattr(op, who), parse_shape(shape), dtype)


def test_q_k_and_v_are_views_of_one_projection_where_the_model_has_one() -> None:
    op = get_operation("rope_attention")
    packed, separate = (draw(op, parse_shape(name)) for name in ("eva01-b16@32 b1", "eva02-b16@32 b1"))
    assert len({packed[name].untyped_storage().data_ptr() for name in "qkv"}) == 1
    assert packed["k"].stride() == (5 * 3 * 768, 3 * 768, 64, 1)
    assert all(separate[name].is_contiguous() for name in "qkv")
    text = draw(get_operation("causal_attention"), parse_shape("eva02-b16:text b1"))
    assert text["v"].stride() == (77 * 3 * 512, 3 * 512, 64, 1)


def test_dropped_tokens_keep_their_rotation() -> None:
    """The kept patches turn by their own angles, not by those of the first rows of the table."""
    op, shape = get_operation("rope_attention"), parse_shape("tiny b2 drop50")
    inputs = draw(op, shape)
    assert inputs["token_index"].shape == (2, 8)
    first = torch.arange(8).expand(2, 8)
    others = outputs(op.eager, inputs | {"token_index": first})
    assert relative_error(outputs(op.eager, inputs), others) > 0.01


def test_the_class_token_is_not_rotated() -> None:
    """Angles of a half turn change the sign of every patch of q and k: only the scores of the class token notice."""
    op, shape = get_operation("rope_attention"), parse_shape("tiny b1")
    inputs = draw(op, shape, torch.float64)
    half_turn = {"cos": torch.full_like(inputs["cos"], -1), "sin": torch.zeros_like(inputs["sin"])}
    q, k = (torch.cat((inputs[name][:, :1], -inputs[name][:, 1:]), 1).transpose(1, 2) for name in "qk")
    expected = F.scaled_dot_product_attention(q, k, inputs["v"].transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(op.eager(**(inputs | half_turn)), expected)


def test_the_mlp_is_the_module_of_the_library() -> None:
    op, shape = get_operation("swiglu_mlp"), parse_shape("tiny b2")
    inputs = draw(op, shape)
    module = evakernels.nn.SwiGLU(shape.width, shape.hidden)
    state = {"ffn_ln.weight": inputs["norm_weight"], "ffn_ln.bias": inputs["norm_bias"]}
    for number in "123":
        state |= {f"w{number}.weight": inputs[f"w{number}"], f"w{number}.bias": inputs[f"b{number}"]}
    module.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(op.ours(**inputs), module(inputs["x"]), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["rope_attention", "token_dropout"])
def test_a_text_has_no_patches(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} works on patches, and 'tiny:text b2' has none"):
        draw(get_operation(name), parse_shape("tiny:text b2"))


# --- what they cost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_flops_are_those_that_torch_counts(name: str, shape: str) -> None:
    """Of matrix products. The counter doesn't know attention on a CPU, so it sees the products written out."""
    op, sizes = get_operation(name), parse_shape(shape)
    inputs, work = draw(op, sizes), op.work(sizes, 4)
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        forward = stack.enter_context(FlopCounterMode(display=False))
        outputs(op.eager, inputs)
    with FlopCounterMode(display=False) as both, sdpa_kernel(SDPBackend.MATH):
        gradients(op, op.eager, inputs)
    counted, counted_back = forward.get_total_flops(), both.get_total_flops() - forward.get_total_flops()
    if name in ATTENTION:  # backward as in torch's own fused kernels, which compute the scores once more
        counted_back = sdpa_backward_flop_count(*[(sizes.batch, sizes.heads, sizes.tokens, sizes.head_dim)] * 4)
    if name == "causal_attention":  # the counter takes the whole square, of which a causal kernel needs half
        counted, counted_back = counted / 2, counted_back / 2
    assert work.backward is not None
    assert (work.forward.flops, work.backward.flops) == (counted, counted_back)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_bytes_are_those_of_inputs_and_outputs(name: str, shape: str, dtype: torch.dtype) -> None:
    op, sizes, (negligible, read_back) = get_operation(name), parse_shape(shape), OPERATIONS[name]
    inputs = draw(op, sizes, dtype)
    held = {key: value.nbytes for key, value in inputs.items() if value is not None and key not in negligible}
    held["out"] = sum(out.nbytes for out in outputs(op.eager, inputs))
    work = op.work(sizes, dtype.itemsize)
    assert work.backward is not None
    written = sum(held[key] for key in op.gradients if key not in negligible)
    assert work.backward.bytes == held["out"] + sum(held[key] for key in read_back) + written
    if name == "token_dropout":  # the other patches aren't read
        held["patches"] = held["patches"] * sizes.kept_patches // sizes.patches
    assert work.forward.bytes == sum(held.values())


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_not_counted_is_negligible(name: str) -> None:
    op = get_operation(name)
    for shape in map(parse_shape, op.shapes["cpu"]):
        inputs = draw(op, shape)
        left_out = sum(inputs[key].nbytes for key in OPERATIONS[name].negligible if inputs[key] is not None)
        assert left_out <= 0.04 * op.work(shape, 4).forward.bytes, shape.name


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_default_shapes_have_names_that_are_read(name: str, device: str) -> None:
    names = get_operation(name).shapes[device]
    assert [parse_shape(shape).name for shape in names] == list(names)
    assert len(set(names)) == len(names)
    batches = {(s.model, s.tower, s.pixels, s.drop): set() for s in map(parse_shape, names)}
    for s in map(parse_shape, names):
        batches[s.model, s.tower, s.pixels, s.drop].add(s.batch)
    assert any(len(sizes) > 1 for sizes in batches.values()), "a plot against the batch needs two"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_attention_meets_the_sizes_of_the_models(device: str) -> None:
    vision, text = ([parse_shape(s) for s in get_operation(name).shapes[device]] for name in ATTENTION)
    assert {197, 257, 577} <= {shape.tokens for shape in vision}
    assert {50} <= {shape.drop for shape in vision}
    assert {77} == {shape.tokens for shape in text}
    assert len({shape.pixels for shape in vision if shape.model == "eva02-l14"}) > 2
    if device == "cuda":
        assert {64, 88, 112, 128} <= {shape.head_dim for shape in vision}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["silu_mul", "swiglu", "swiglu_mlp"])
def test_swiglu_meets_both_hidden_sizes(name: str, device: str) -> None:
    assert {2048, 2730} == {parse_shape(shape).hidden for shape in get_operation(name).shapes[device]}


# --- peers ----------------------------------------------------------------------------------------------------------

HERE = [
    (op, shape, peer.name)
    for op, shape in CASES
    for peer in peers_of(op)
    if peer.absence("cpu") is None and peer.name != "FlexAttention"
]


def test_the_peers_that_come_with_the_tests_are_all_here() -> None:
    assert {name for op, _, name in HERE if op == "rope_attention"} == {"sdpa flash", "sdpa math", "timm"}
    assert {name for op, _, name in HERE if op == "causal_attention"} == {"sdpa flash", "sdpa math"}
    assert {name for op, _, name in HERE if op == "swiglu_mlp"} == {"timm"}
    assert {name for op, _, name in HERE if op == "token_dropout"} == {"torch indexing"}


@pytest.mark.parametrize(("name", "shape", "peer"), HERE)
def test_peers_on_a_cpu_agree_with_float64(name: str, shape: str, peer: str) -> None:
    op, sizes = get_operation(name), parse_shape(shape)
    assert_exact(op, build(name, peer, sizes), sizes)


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if case[0] in ATTENTION])
def test_flex_attention_agrees_with_float64(name: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled here: what it is asked for is the same."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    op, sizes = get_operation(name), parse_shape(shape)
    assert_exact(op, build(name, "FlexAttention", sizes), sizes, training=False)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_flex_attention_compiles() -> None:
    op, sizes = get_operation("causal_attention"), parse_shape("tiny:text b2")
    assert_exact(op, build("causal_attention", "FlexAttention", sizes), sizes, training=False)


# Stand-ins with the signatures and the meaning that the packages document.


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def _flash_2(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    return _attention(q, k, v, causal)


def _flash_4(
    q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None = None, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    return _attention(q, k, v, causal), q.detach().sum(-1)


class _LowerTriangularMask:
    pass


def _memory_efficient(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None) -> Tensor:
    return _attention(query, key, value, isinstance(attn_bias, _LowerTriangularMask))


class _LigerSiLUMul(torch.autograd.Function):
    """As Liger's: the gradients are written over the inputs."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> Outputs:
        a, b = ctx.saved_tensors
        da, db = torch.ops.aten.silu_backward(dc * b, a), dc * F.silu(a)
        a.data.copy_(da)
        b.data.copy_(db)
        return a, b


def _linear_gated(
    x: Tensor,
    weight: Tensor,
    activation: str,
    bias: Tensor | None = None,
    store_preact: bool = True,
    concat_layout: bool = False,
) -> tuple[Tensor | None, Tensor]:
    assert activation == "swiglu"
    hidden = F.linear(x, weight, bias)
    gate, up = hidden.chunk(2, -1) if concat_layout else (hidden[..., ::2], hidden[..., 1::2])
    return hidden if store_preact else None, F.silu(gate) * up


STAND_INS: dict[str, dict[str, Any]] = {
    "flash_attn": {"flash_attn_func": _flash_2},
    "flash_attn.cute": {"flash_attn_func": _flash_4},
    "xformers.ops": {"memory_efficient_attention": _memory_efficient, "LowerTriangularMask": _LowerTriangularMask},
    "liger_kernel.ops.swiglu": {"LigerSiLUMulFunction": _LigerSiLUMul},
    "quack.linear": {"linear_gated_func": _linear_gated},
}


@pytest.fixture
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, STAND_INS)


ELSEWHERE = [
    *((op, shape, peer, True) for op, shape in CASES if op in ATTENTION for peer in ("flash-attn", "flash-attn-4")),
    *((op, shape, "xformers", True) for op, shape in CASES if op in ATTENTION),
    ("silu_mul", "tiny b2", "liger-kernel", False),
    ("swiglu_mlp", "tiny b2", "liger-kernel", True),
    ("swiglu_mlp", "tiny b2", "quack-kernels", False),
]


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize(("name", "shape", "peer", "training"), ELSEWHERE)
def test_peers_of_the_gpu_are_asked_for_the_same_thing(name: str, shape: str, peer: str, training: bool) -> None:
    op, sizes = get_operation(name), parse_shape(shape)
    assert_exact(op, build(name, peer, sizes), sizes, training=training)


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize(
    ("name", "peer", "reason"),
    [
        ("rope_attention", "FlexAttention", "no backward pass on a CPU"),
        ("silu_mul", "liger-kernel", "over gate and up"),
        ("swiglu_mlp", "quack-kernels", "where a norm follows"),
    ],
)
def test_peers_without_a_usable_backward_say_so(name: str, peer: str, reason: str) -> None:
    op, shape = get_operation(name), parse_shape("tiny b2")
    with pytest.raises(NotImplementedError, match=reason):
        gradients(op, build(name, peer, shape), draw(op, shape))


@pytest.mark.parametrize("name", ATTENTION)
def test_both_attentions_have_the_same_peers(name: str) -> None:
    expected = ["sdpa flash", "sdpa efficient", "sdpa cudnn", "sdpa math", "FlexAttention"]
    expected += ["flash-attn", "flash-attn-4", "xformers"]
    assert [peer.name for peer in peers_of(name) if peer.name != "timm"] == expected


@pytest.mark.exhaustive
def test_the_rotation_in_front_of_a_peer_is_fused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first argument tells that it lies on a GPU; what torch.compile is given makes of it what is expected."""
    compiled = []

    def compile(function: Callable[..., Any], **options: object) -> Callable[..., Any]:
        assert options["fullgraph"]
        return lambda **inputs: compiled.append(set(inputs)) or function(**inputs)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(rope_attention, "_fused_rotation", rope_attention._fused_rotation.__wrapped__)
    op, sizes = get_operation("rope_attention"), parse_shape("tiny b2 drop50")
    inputs = draw(op, sizes)
    on_cpu = outputs(build(op.name, "sdpa math", sizes), inputs)
    assert compiled == []
    inputs["q"] = inputs["q"].as_subclass(_OnGPU)
    on_gpu = outputs(build(op.name, "sdpa math", sizes), inputs)
    assert compiled == [{"q", "k", "cos", "sin", "token_index"}]
    assert relative_error(on_gpu, on_cpu) == 0


class _OnGPU(Tensor):
    is_cuda = True


def test_sdpa_peers_run_on_their_backend() -> None:
    """Each is refused where its backend is: on a CPU there is no memory-efficient one."""
    op, shape = get_operation("rope_attention"), parse_shape("tiny b2")
    function: Callable[..., Any] = build("rope_attention", "sdpa efficient", shape)
    with pytest.raises(RuntimeError, match="No viable backend"):
        outputs(function, draw(op, shape))
