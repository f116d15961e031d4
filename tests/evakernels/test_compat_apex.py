"""`evakernels.compat.apex` compared with torch's norms, torch's and timm's optimizers and apex's state dicts."""

import copy

import numpy as np
import pytest
import timm.optim
import torch
from optimizer_checks import DECAYS, LRS, parameters, step, tensors
from torch import nn

from evakernels.compat import apex


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- norms ----------------------------------------------------------------------------------------------------------


def of_torch(shape, rms):
    return nn.RMSNorm(shape, eps=1e-5) if rms else nn.LayerNorm(shape)


def pair(cls, shape, **options):
    ours, theirs = cls(shape, **options), of_torch(shape, "RMS" in cls.__name__)
    state = {name: randn(*value.shape, seed=i) for i, (name, value) in enumerate(theirs.state_dict().items())}
    theirs.load_state_dict(state)
    if options.get("elementwise_affine", True):
        ours.load_state_dict(state)
    return ours, theirs


@pytest.mark.parametrize("shape", [12, np.int64(12), (12,), (3, 4)], ids=str)
@pytest.mark.parametrize(
    "cls", [apex.FusedLayerNorm, apex.FusedRMSNorm, apex.MixedFusedLayerNorm, apex.MixedFusedRMSNorm]
)
def test_norms_match_torch(cls, shape):
    ours, theirs = pair(cls, shape)
    inputs = [randn(5, *np.atleast_1d(shape), seed=9).requires_grad_() for _ in range(2)]
    for module, x in zip((ours, theirs), inputs, strict=True):
        module(x).pow(3).sum().backward()
    torch.testing.assert_close(ours(inputs[0]), theirs(inputs[1]))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_p.grad, theirs_p.grad)


@pytest.mark.parametrize("cls", [apex.FusedLayerNorm, apex.FusedRMSNorm])
def test_norms_without_affine_match_torch(cls):
    module = cls(12, elementwise_affine=False, memory_efficient=True)
    assert not list(module.parameters())
    x = randn(5, 12)
    torch.testing.assert_close(module(x), of_torch(12, cls is apex.FusedRMSNorm)(x))


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_norms_return_weight_dtype(dtype, weight):
    ours, theirs = pair(apex.MixedFusedLayerNorm, 12)
    ours.to(weight)
    theirs.to(weight).float()
    x = randn(5, 12, seed=9).to(dtype)
    with torch.autocast("cpu", dtype=torch.float16):
        got = ours(x)
    assert got.dtype == weight
    torch.testing.assert_close(got, theirs(x.float()).to(weight))


def test_plain_norms_follow_autocast():
    module = apex.FusedLayerNorm(12)
    assert module(randn(5, 12).bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(randn(5, 12)).dtype == torch.bfloat16


def test_norms_wrong_input_raises():
    with pytest.raises(ValueError, match="FusedLayerNorm: input"):
        apex.FusedLayerNorm((3, 4))(randn(2, 5))
    with pytest.raises(RuntimeError, match="MixedFusedRMSNorm: elementwise_affine"):
        apex.MixedFusedRMSNorm(4, elementwise_affine=False)
    with pytest.raises(TypeError, match="bias"):
        apex.MixedFusedLayerNorm(4, bias=False)


# --- optimizers -----------------------------------------------------------------------------------------------------


def groups(dtype=torch.float64):
    params = [nn.Parameter(p) for p in tensors(0, dtype)]
    return [{"params": [p], "lr": lr, "weight_decay": d} for p, lr, d in zip(params, LRS, DECAYS, strict=True)]


def copied_groups(optimizer):
    """The parameter groups of another optimizer on copies of the parameters."""
    return [{**g, "params": [nn.Parameter(p.detach().clone()) for p in g["params"]]} for g in optimizer.param_groups]


def assert_same_path(ours, theirs, steps=5, **tolerance):
    for seed in range(1, steps + 1):
        step(ours, tensors(seed))
        step(theirs, tensors(seed))
    for got, expected in zip(parameters(ours), parameters(theirs), strict=True):
        torch.testing.assert_close(got, expected.to(got.dtype), **tolerance)


def test_adam_matches_torch():
    assert_same_path(apex.FusedAdam(groups()), torch.optim.AdamW(groups()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_lamb_matches_timm(max_grad_norm):
    ours, theirs = (cls(groups(), max_grad_norm=max_grad_norm) for cls in (apex.FusedLAMB, timm.optim.Lamb))
    assert_same_path(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [apex.FusedAdam, apex.FusedLAMB])
def test_grad_scaler_overflow_skips_step(make):
    """Gradients are unscaled before clipping; a step with an overflow changes nothing and isn't counted."""
    plain, scaled = make(groups(torch.float32)), make(groups(torch.float32))
    for seed, overflow in ((1, False), (2, True), (3, False)):
        if not overflow:
            step(plain, tensors(seed))
        scaled.grad_scale, scaled.found_inf = torch.tensor(8.0), torch.tensor(float(overflow))
        step(scaled, [8 * g for g in tensors(seed)])
    for got, expected in zip(parameters(scaled), parameters(plain), strict=True):
        torch.testing.assert_close(got, expected)
    assert [group["step"] for group in scaled.state_dict()["param_groups"]] == [2] * 4


def test_master_weights_bf16_match_float32():
    ours = apex.FusedAdam(groups(torch.bfloat16), lr=1e-4, master_weights=True, capturable=True)
    theirs = torch.optim.AdamW(groups(torch.bfloat16), lr=1e-4)
    with torch.no_grad():
        for p in parameters(theirs):
            p.data = p.data.float()
    for seed in range(1, 6):
        grads = [g.bfloat16() for g in tensors(seed)]
        step(ours, grads)
        step(theirs, grads)
    for got, expected in zip(parameters(ours), parameters(theirs), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(ours.state[got]["master_param"], expected.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.detach(), expected.detach().bfloat16())


@pytest.mark.parametrize("cls", [apex.FusedAdam, apex.FusedLAMB])
def test_state_dict_has_apex_layout(cls):
    optimizer = cls(groups(torch.float32))
    for seed in (1, 2):
        step(optimizer, tensors(seed))
    state = optimizer.state_dict()
    assert {frozenset(of_param) for of_param in state["state"].values()} == {frozenset({"exp_avg", "exp_avg_sq"})}
    assert [group["step"] for group in state["param_groups"]] == [2] * 4

    other = cls(copied_groups(optimizer))
    other.load_state_dict(copy.deepcopy(state))
    for one in (optimizer, other):
        step(one, tensors(3))
    for got, expected in zip(parameters(other), parameters(optimizer), strict=True):
        assert torch.equal(got, expected)
    assert "step" not in optimizer.param_groups[0]


def test_adam_resumes_torch_state():
    theirs = torch.optim.AdamW(groups(torch.float32))
    step(theirs, tensors(1))
    ours = apex.FusedAdam(copied_groups(theirs))
    ours.load_state_dict(theirs.state_dict())
    assert_same_path(ours, theirs, steps=1)


def test_zero_grad_none_or_zero():
    for set_grad_none in (True, False):
        optimizer = apex.FusedAdam(groups(), set_grad_none=set_grad_none)
        step(optimizer, tensors(1))
        optimizer.zero_grad()
        assert all((p.grad is None) is set_grad_none for p in parameters(optimizer))


@pytest.mark.parametrize("cls", [apex.FusedAdam, apex.FusedLAMB])
def test_amsgrad_raises(cls):
    with pytest.raises(RuntimeError, match=f"{cls.__name__}: amsgrad"):
        cls(groups(), amsgrad=True)


OF_BOTH = {"bias_correction": False, "adam_w_mode": False}


@pytest.mark.parametrize(
    ("cls", "option", "value"),
    [
        *((apex.FusedAdam, *item) for item in OF_BOTH.items()),
        *((apex.FusedLAMB, *item) for item in {**OF_BOTH, "grad_averaging": False, "use_nvlamb": True}.items()),
    ],
)
def test_other_value_than_apex_default_raises(cls, option, value):
    with pytest.raises(ValueError, match=f"{cls.__name__}: {option} must be"):
        cls(groups(), **{option: value})
    cls(groups(), **{option: not value})


def test_group_or_state_with_other_value_raises():
    optimizer = apex.FusedLAMB(groups())
    with pytest.raises(ValueError, match="grad_averaging must be True"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "grad_averaging": False})
    state = optimizer.state_dict()
    state["param_groups"][1]["bias_correction"] = 0
    with pytest.raises(ValueError, match="bias_correction must be True"):
        optimizer.load_state_dict(state)
