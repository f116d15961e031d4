"""`evakernels.nn.linear` by oneDNN compared with torch's function."""

import sys

import pytest
import torch
import torch.nn.functional as F
from op_checks import assert_as_accurate_as_torch, assert_compiles, assert_deterministic, assert_opcheck
from torch.autograd import forward_ad
from torch.func import jvp
from torch.utils.flop_counter import FlopCounterMode

from evakernels.nn import Linear, linear

_module = sys.modules[linear.__module__]

pytestmark = pytest.mark.by_processor


@pytest.fixture
def direct(monkeypatch):
    """The calls that oneDNN ran, for small matmuls too."""
    if torch.float32 not in _module.faster_dtypes():
        pytest.skip("oneDNN isn't chosen in float32; EVAKERNELS_PROCESSOR=amd chooses it")
    monkeypatch.setattr(_module, "_MIN_MACS", dict.fromkeys(_module._MIN_MACS, 0))
    calls, product = [], _module._product
    monkeypatch.setattr(_module, "_product", lambda *args: calls.append(args) or product(*args))
    return calls


def _inputs(rows, inner, columns, bias=True):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(2, rows, inner, generator=generator)
    weight = torch.randn(columns, inner, generator=generator)
    return [x, weight, torch.randn(columns, generator=generator) if bias else None]


@pytest.mark.parametrize(("inner", "columns"), [(40, 70), (70, 40)], ids=["widens", "narrows"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear_as_accurate_as_torch(direct, inner, columns, bias):
    inputs = _inputs(33, inner, columns, bias)
    assert_as_accurate_as_torch(linear, F.linear, inputs, torch.float32)
    assert_deterministic(linear, inputs)
    assert direct


def test_linear_casts_the_bias_to_its_weight():
    x, weight, bias = _inputs(3, 5, 4)
    x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.requires_grad_()
    y = linear(x, weight, bias)
    assert torch.equal(y, F.linear(x, weight, bias.bfloat16()))
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full((4,), 6.0))


def test_linear_result_may_change_in_place(direct):
    leaves = [t.requires_grad_() for t in _inputs(3, 5, 4)]
    ours, theirs = (
        torch.autograd.grad(function(*leaves).relu_().square().sum(), leaves) for function in (linear, F.linear)
    )
    torch.testing.assert_close(ours, theirs)


def test_linear_has_a_second_derivative(direct):
    leaves = [t.requires_grad_() for t in _inputs(3, 5, 4)]

    def second(function):
        (dx,) = torch.autograd.grad(function(*leaves).square().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), leaves)

    for ours, theirs in zip(second(linear), second(F.linear), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert direct


def test_linear_compiles_and_counts_flops(direct):
    inputs = _inputs(3, 5, 4)
    assert_compiles(linear, inputs)
    called = len(direct)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear(*inputs)
    assert counter.get_total_flops() == 2 * 2 * 3 * 5 * 4
    assert len(direct) == called


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_linear_compiled_runs_onednn(direct, backend, dynamic):
    """Forward and backward, without graph breaks."""
    torch._dynamo.reset()
    compiled = torch.compile(linear, backend=backend, fullgraph=True, dynamic=dynamic)
    for rows, inner, columns in ((3, 5, 4), (7, 4, 5)):
        leaves = [t.requires_grad_() for t in _inputs(rows, inner, columns)]
        y, expected = compiled(*leaves), F.linear(*leaves)
        torch.testing.assert_close(y, expected)
        assert len(direct) == 1
        ours, theirs = (torch.autograd.grad(out.square().sum(), leaves) for out in (y, expected))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert len(direct) == (3 if inner > columns else 2)
        direct.clear()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear_compiled_op_passes_opcheck(bias):
    x, weight, bias = _inputs(3, 5, 4, bias)
    assert_opcheck(torch.ops.evakernels.linear.default, (x, weight, bias))


def test_linear_compiled_vmap_uses_torch(direct):
    torch._dynamo.reset()
    batched = torch.vmap(linear, (0, None, None))
    inputs = _inputs(3, 5, 4)
    compiled = torch.compile(batched, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), F.linear(*inputs))
    assert not direct


@pytest.mark.parametrize("strict", [False, True])
def test_linear_exports_any_batch_size(strict):
    """An exported program has neither the op nor a limit of sizes."""
    module = Linear(512, 2048).requires_grad_(False)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(module, (torch.ones(4, 4, 512),), dynamic_shapes=shapes, strict=strict)
    assert "evakernels" not in str(program.graph)
    assert program.module()(torch.ones(1, 4, 512)).shape == (1, 4, 2048)


def test_linear_autocast_and_float64_use_torch(direct):
    x, weight, bias = _inputs(3, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    assert linear(x.double(), weight.double(), bias.double()).dtype == torch.float64
    with pytest.raises(RuntimeError):
        linear(x, weight.t(), bias)
    assert not direct


def test_linear_forward_mode_and_batched_gradients(direct):
    """Forward mode by dual numbers and by functorch, and gradients of several cotangents at once."""
    given = tuple(_inputs(3, 5, 4))
    tangents = tuple(t.flip(0) for t in given)

    def by_duals(function):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(given, tangents, strict=True)]
            return forward_ad.unpack_dual(function(*duals)).tangent

    def several(function):
        leaves = [t.clone().requires_grad_() for t in given]
        cotangents = torch.stack([given[0] @ given[1].T, tangents[0] @ given[1].T])
        return torch.autograd.grad(function(*leaves), leaves, cotangents, is_grads_batched=True)

    for result in (by_duals, several, lambda function: jvp(function, given, tangents)[1]):
        torch.testing.assert_close(result(linear), result(F.linear), atol=1e-4, rtol=1e-4)
    assert direct
