"""Who is compared on the operations: that each peer is asked for the same thing."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_case_checks import (
    ATTENTION,
    CASES,
    OPERATIONS,
    assert_exact,
    build,
    draw,
    each_caption_alone,
    gradients,
    moved,
    outputs,
    pretend_installed,
)
from torch import Tensor, nn

from benchmarks.accuracy import as_double, relative_error
from benchmarks.operation import Outputs, get_operation, peers_of
from benchmarks.shapes import parse_shape
from evakernels.compat import flash_attn, xformers

pytestmark = pytest.mark.usefixtures("few_parameters")

FLEX = "FlexAttention"
ENCODERS = ("encode_image", "encode_text")  # test_bench_engines.py
PACKED, PACKED_SHAPE = get_operation("packed_attention"), parse_shape("tiny:text b5")
HERE = [
    (op, shape, peer.name)
    for op, shape in CASES
    for peer in peers_of(op)
    if peer.absence("cpu") is None and peer.name != FLEX and op not in ENCODERS
]


@pytest.mark.parametrize(("name", "shape", "peer"), HERE)
def test_peers_on_a_cpu_agree_with_float64(name: str, shape: str, peer: str) -> None:
    op, sizes = get_operation(name), parse_shape(shape)
    assert_exact(op, build(name, peer, sizes), sizes)


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if "attention" in case[0]])
def test_flex_attention_agrees_with_float64(name: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled here: only its arguments are tested."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    op, sizes = get_operation(name), parse_shape(shape)
    assert_exact(op, build(name, FLEX, sizes), sizes, training=False)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_flex_attention_compiles() -> None:
    op, sizes = get_operation("causal_attention"), parse_shape("tiny:text b2")
    assert_exact(op, build("causal_attention", FLEX, sizes), sizes, training=False)


@pytest.mark.parametrize("name", ["clip_loss", "siglip_loss"])
def test_open_clip_runs_under_autocast(name: str) -> None:
    op, shape = get_operation(name), parse_shape("tiny b7")
    function = build(name, "open_clip_torch", shape)
    assert_exact(op, function, shape, torch.bfloat16, tolerance=5e-2)
    seen: list[bool] = []
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(torch.is_autocast_enabled("cpu"))
    )
    try:
        for dtype in (torch.bfloat16, torch.float32):
            function(**draw(op, shape, dtype))
    finally:
        handle.remove()
    assert seen == [True, False]


# --- stand-ins with the signatures and the meaning that the packages document, for what evakernels.compat has not ----


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def _flash_4(q, k, v, qv=None, *, causal=False):
    return _attention(q, k, v, causal), q.detach().sum(-1)


def _varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    assert is_causal
    assert max_q == max_k == cu_seq_q.diff().max()
    return each_caption_alone(query, key, value, cu_seq_k)


def _varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
    return _varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0))


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


def _linear_gated(x, weight, activation, bias=None, store_preact=True, concat_layout=False):
    assert activation == "swiglu"
    hidden = F.linear(x, weight, bias)
    gate, up = hidden.chunk(2, -1) if concat_layout else (hidden[..., ::2], hidden[..., 1::2])
    return hidden if store_preact else None, F.silu(gate) * up


def _flash_loss(q, k, labels=None, scale=None, head_dim=256):
    assert labels is None
    return F.cross_entropy(scale * q @ k.T, torch.arange(len(q)), reduction="none")


def _linear_cross_entropy(e, c, targets, reduction="mean", filter_eps="high"):
    assert filter_eps is None
    return F.cross_entropy(e @ c.T, targets, reduction=reduction)


class _LigerLoss(nn.Module):
    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(_input @ lin_weight.T, target)


def _multi_tensor_lamb(
    chunk, overflow, lists, lr, beta1, beta2, epsilon, step, bias_correction, decay, averaging, mode, norm, most, nvlamb
):
    """The kernel's arithmetic; like the kernel, it leaves the direction in the gradients."""
    assert (bias_correction, averaging, mode) == (1, 1, 1)
    assert float(norm) <= most
    for g, p, m, v in zip(*lists, strict=True):
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).add_(g.square(), alpha=1 - beta2)
        g.copy_(m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + epsilon) + decay * p)
        ratio = p.norm() / g.norm() if nvlamb or decay != 0 else 1.0
        p.sub_(lr * ratio * g)


def _multi_tensor_adam(chunk, overflow, lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay):
    """The kernel's arithmetic; mode 1 is AdamW."""
    assert (mode, bias_correction) == (1, 1)
    for g, p, m, v in zip(*lists, strict=True):
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).add_(g.square(), alpha=1 - beta2)
        p.sub_(lr * (m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + epsilon) + weight_decay * p))


def _multi_tensor_applier(op: Any, overflow: Tensor, lists: list[list[Tensor]], *args: Any) -> Any:
    return op(2048 * 32, overflow, lists, *args)


STAND_INS: dict[str, dict[str, Any]] = {
    "flash_attn": {name: getattr(flash_attn, name) for name in flash_attn.__all__},
    "flash_attn.cute": {"flash_attn_func": _flash_4},
    "xformers.ops": {name: getattr(xformers, name) for name in xformers.__all__},
    "xformers.ops.fmha.attn_bias": {"BlockDiagonalCausalMask": xformers.BlockDiagonalCausalMask},
    "liger_kernel.ops.swiglu": {"LigerSiLUMulFunction": _LigerSiLUMul},
    "quack.linear": {"linear_gated_func": _linear_gated},
    "inf_cl": {"cal_flash_loss": _flash_loss},
    "cut_cross_entropy": {"linear_cross_entropy": _linear_cross_entropy},
    "liger_kernel.transformers.fused_linear_cross_entropy": {"LigerFusedLinearCrossEntropyLoss": _LigerLoss},
    "amp_C": {
        "multi_tensor_lamb": _multi_tensor_lamb,
        "multi_tensor_adam": _multi_tensor_adam,
    },
    "apex.multi_tensor_apply": {"multi_tensor_applier": _multi_tensor_applier},
}
ELSEWHERE = {
    **dict.fromkeys(ATTENTION, ("flash-attn", "flash-attn-4", "xformers")),
    "packed_attention": ("flash-attn", "xformers"),
    "silu_mul": ("liger-kernel",),
    "swiglu_mlp": ("liger-kernel", "quack-kernels"),
    "clip_loss": ("inf-cl", "cut-cross-entropy", "liger-kernel"),
    "lamb_step": ("apex",),
    "adamw_step": ("apex",),
}
FORWARD_ONLY = [("rope_attention", FLEX), ("silu_mul", "liger-kernel"), ("swiglu_mlp", "quack-kernels")]
OPTIMIZER_PEERS = [("lamb_step", "timm"), ("lamb_step", "apex"), ("adamw_step", "torch fused"), ("adamw_step", "apex")]


@pytest.fixture
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, STAND_INS)


def test_every_peer_is_tested() -> None:
    tested = {(op, peer) for op, _, peer in HERE} | {(op, peer) for op, peers in ELSEWHERE.items() for peer in peers}
    tested |= {(op, FLEX) for op in (*ATTENTION, "packed_attention")} | {("packed_attention", "torch varlen")}
    # These need a GPU.
    tested |= {(op, peer) for op in ATTENTION for peer in ("sdpa efficient", "sdpa cudnn")}
    assert tested == {(op, peer.name) for op in OPERATIONS if op not in ENCODERS for peer in peers_of(op)}


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize(
    ("name", "shape", "peer"), [(*case, peer) for case in CASES for peer in ELSEWHERE.get(case[0], ())]
)
def test_gpu_peers_get_the_same_problem(name: str, shape: str, peer: str) -> None:
    op, sizes = get_operation(name), parse_shape(shape)
    assert_exact(op, build(name, peer, sizes), sizes, training=(name, peer) not in FORWARD_ONLY)


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize(
    ("peer", "reason"),
    list(zip(FORWARD_ONLY, ("no backward pass on a CPU", "over gate and up", "where a norm follows"), strict=True)),
)
def test_peers_without_backward_raise(peer: tuple[str, str], reason: str) -> None:
    op, shape = get_operation(peer[0]), parse_shape("tiny b2")
    with pytest.raises(NotImplementedError, match=reason):
        gradients(op, build(*peer, shape), draw(op, shape))


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize(("name", "peer"), OPTIMIZER_PEERS)
def test_optimizer_peers_make_the_same_step(name: str, peer: str) -> None:
    op, shape = get_operation(name), parse_shape("tiny b1")
    inputs = as_double(draw(op, shape))
    expected = moved(op.eager, as_double(draw(op, shape)))
    assert relative_error(moved(build(name, peer, shape), inputs), expected) <= 1e-10


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize(("name", "peer"), OPTIMIZER_PEERS)
def test_peers_of_one_dtype_raise(name: str, peer: str) -> None:
    op, shape = get_operation(name), parse_shape("tiny b1")
    with pytest.raises(TypeError, match=r"no moments in torch.float32 for parameters in torch.bfloat16"):
        outputs(build(name, peer, shape), draw(op, shape, torch.bfloat16))


@pytest.mark.parametrize("function", [_varlen, _varlen_2_11])
def test_varlen_gets_the_same_problem(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    assert_exact(PACKED, build(PACKED.name, "torch varlen", PACKED_SHAPE), PACKED_SHAPE)


def test_varlen_accepts_its_arguments() -> None:
    """By its real signature, on tensors without data; there is no kernel of it for a CPU."""
    inputs = {
        name: x.to("meta") if isinstance(x, Tensor) else x
        for name, x in draw(PACKED, PACKED_SHAPE, torch.bfloat16).items()
    }
    (out,) = outputs(build(PACKED.name, "torch varlen", PACKED_SHAPE), inputs)
    assert out.shape == inputs["q"].shape
