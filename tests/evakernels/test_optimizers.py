"""What AdamW and Lamb have in common beside their kernels."""

import sys
from functools import partial

import pytest
import torch
from on_device import DEVICE
from op_checks import Recorder, assert_opcheck
from optimizer_checks import BETAS, DECAYS, EPS, LRS, assert_same_state, optimizer_of, parameters, step, tensors
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import evakernels
from evakernels.compat.apex import FusedLAMB
from evakernels.optim import AdamW, Lamb, _device_optimizer


def every_optimizer(test):
    return pytest.mark.kernels("newest triton")(pytest.mark.parametrize("kind", [AdamW, Lamb])(test))


@every_optimizer
def test_grad_scaler_reads_no_flag_on_the_host(kind):
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
    optimizer, plain = (optimizer_of(tensors(0, torch.float32), kind) for _ in range(2))
    before = [p.clone() for p in parameters(optimizer)]
    for factor in (torch.inf, 1.0):
        optimizer.zero_grad()
        loss = sum((p * g).sum() for p, g in zip(parameters(optimizer), tensors(1, torch.float32), strict=True))
        scaler.scale(factor * loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == torch.inf:
            assert all(torch.equal(a, b) for a, b in zip(parameters(optimizer), before, strict=True))
            assert scaler.get_scale() == 2.0
    step(plain, tensors(1))
    for a, b in zip(parameters(optimizer), parameters(plain), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(optimizer.state[a], plain.state[b], rtol=1e-6, atol=1e-6)


@every_optimizer
def test_rate_on_device_follows_a_schedule(kind, monkeypatch):
    """The host never reads it: a captured CUDA graph follows the schedule, too, and a loaded state."""
    monkeypatch.setattr(_device_optimizer, "_is_on_device", lambda lr: isinstance(lr, torch.Tensor))
    rate = torch.tensor(0.5)
    ours = optimizer_of(tensors(0, torch.float32), kind, lrs=[rate, rate, 0.25, rate])
    theirs = optimizer_of(tensors(0, torch.float32), kind, lrs=[0.5, 0.5, 0.25, 0.5])
    for seed in (1, 2):
        with Recorder() as recorder:
            step(ours, tensors(seed))
            rate.mul_(0.5)
        assert torch.ops.aten._local_scalar_dense.default not in [op for op, _ in recorder.calls]
        step(theirs, tensors(seed))
        for group in theirs.param_groups[:2] + theirs.param_groups[3:]:
            group["lr"] *= 0.5
    assert_same_state(ours, theirs, 1e-6)
    ours.load_state_dict(
        theirs.state_dict()
        | {"param_groups": optimizer_of(tensors(0), kind, lrs=[2.0] * 4).state_dict()["param_groups"]}
    )
    assert ours.param_groups[0]["lr"] is rate
    assert rate == 2.0
    assert ours.param_groups[2]["lr"] == 2.0


@pytest.mark.parametrize(("kind", "op"), [(AdamW, "adamw_update"), (Lamb, "lamb_step")])
def test_one_call_per_pair_of_betas(kind, op, monkeypatch):
    calls = []
    module = sys.modules[kind.__module__]
    monkeypatch.setattr(module, op, lambda params, *args, **options: calls.append(len(params)))
    optimizer = optimizer_of(tensors(0), kind)
    step(optimizer, tensors(1))
    optimizer.param_groups[0]["betas"] = [0.5, 0.5]
    step(optimizer, tensors(1))
    assert calls == [4, 1, 3]


@every_optimizer
@pytest.mark.parametrize("grad_scale", [None, 4.0])
def test_maximize_is_a_step_down_the_negative_gradient(kind, grad_scale):
    """Of one group; the others go down. Gradients stay as they are."""
    up, down = (optimizer_of(tensors(0), kind) for _ in range(2))
    up.param_groups[1]["maximize"] = True
    if grad_scale is not None:
        up.grad_scale = torch.tensor(grad_scale)
    grads = [g * (grad_scale or 1.0) for g in tensors(1)]
    step(up, grads)
    step(down, [-g if i == 1 else g for i, g in enumerate(tensors(1))])
    for got, expected, grad in zip(parameters(up), parameters(down), grads, strict=True):
        assert torch.equal(got, expected)
        assert torch.equal(got.grad, grad)


@every_optimizer
@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("skipped", [False, True])
def test_bf16_parameters_take_float32_gradients(kind, rounding, skipped):
    """The step of a float32 gradient that bfloat16 holds too is bit-equal; a skipped one changes nothing."""
    narrow, wide = (optimizer_of(tensors(0, torch.bfloat16), kind, stochastic_rounding=rounding) for _ in range(2))
    before = [parameter.clone() for parameter in parameters(wide)]
    for optimizer, dtype in ((narrow, torch.bfloat16), (wide, torch.float32)):
        for parameter, gradient in zip(parameters(optimizer), tensors(1, torch.bfloat16), strict=True):
            parameter.grad_dtype = dtype
            parameter.grad = gradient.to(dtype)
        optimizer.grad_scale = evakernels.gradient_norm([p.grad for p in parameters(optimizer)])
        optimizer.found_inf = torch.tensor(float(skipped))
        optimizer.step()
    assert torch.equal(narrow.grad_scale, wide.grad_scale)
    for got, expected, start in zip(parameters(wide), parameters(narrow), before, strict=True):
        assert torch.equal(got, expected)
        assert torch.equal(wide.state[got]["exp_avg"], narrow.state[expected]["exp_avg"])
        assert skipped == torch.equal(got, start)


@every_optimizer
def test_a_parameter_without_gradient_is_left_alone(kind):
    optimizer = optimizer_of(tensors(0), kind)
    used, unused = parameters(optimizer)[:2]
    before = unused.clone()
    optimizer.step()
    assert not optimizer.state
    used.grad = torch.ones_like(used)
    optimizer.step()
    assert torch.equal(unused, before)
    assert list(optimizer.state) == [used]


@every_optimizer
@pytest.mark.parametrize("saved", [int, float, torch.Tensor.double])
def test_loaded_steps_become_float32(kind, saved):
    """As numbers by torch before 1.12, and since then in torch's default dtype, which is the user's to set."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        straight, first = (optimizer_of(tensors(0), kind) for _ in range(2))
        for optimizer in (straight, first):
            step(optimizer, tensors(1))
        state = first.state_dict()
        state["state"] = {i: {**of, "step": saved(of["step"])} for i, of in state["state"].items()}
        resumed = optimizer_of(parameters(first), kind)
        resumed.load_state_dict(state)
        for optimizer in (straight, resumed):
            step(optimizer, tensors(2))
    finally:
        torch.set_default_dtype(default)
    for a, b in zip(parameters(straight), parameters(resumed), strict=True):
        assert torch.equal(a, b)
        assert resumed.state[b]["step"].dtype == torch.float32


@pytest.mark.parametrize(
    ("first_kind", "second_kind"),
    [
        *((AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW), (AdamW, AdamW), (Lamb, Lamb)),
        (partial(Lamb, variant="deepspeed"),) * 2,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.kernels("newest triton")
def test_resume_is_bit_exact(first_kind, second_kind, dtype, tmp_path):
    """Between AdamW and torch's up to rounding."""
    if dtype == torch.bfloat16 and second_kind is torch.optim.AdamW:
        pytest.skip("torch rounds float32 moments to the dtype of the parameters")
    straight, first = (optimizer_of(tensors(0, dtype), first_kind) for _ in range(2))
    for seed in (1, 2, 3):
        for optimizer in (straight, first):
            step(optimizer, tensors(seed))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = optimizer_of(parameters(first), second_kind)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for p, q in zip(parameters(first), parameters(second), strict=True):
        for name, value in first.state[p].items():
            assert torch.equal(second.state[q][name], value)
            assert second.state[q][name].dtype == value.dtype
    for seed in (4, 5, 6):
        for optimizer in (straight, second):
            step(optimizer, tensors(seed))
    same = first_kind is second_kind
    assert_same_state(straight, second, 0 if same else 1e-6 if dtype == torch.float32 else 0.02)
    assert not same or second.state_dict()["param_groups"] == straight.state_dict()["param_groups"]


@every_optimizer
def test_closure_runs_with_gradients(kind):
    optimizer = optimizer_of(tensors(0), kind)
    before = [p.clone() for p in parameters(optimizer)]

    def closure():
        loss = sum(p.square().sum() for p in parameters(optimizer))
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    torch.testing.assert_close(loss.detach(), sum(p.square().sum() for p in before).detach())
    assert not any(torch.equal(a, b) for a, b in zip(before, parameters(optimizer), strict=True))


@every_optimizer
def test_step_bumps_the_parameters_version(kind):
    weight = nn.Parameter(torch.ones(3))
    loss = weight.square().sum()
    weight.grad = torch.ones(3)
    kind([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("op", ["adamw_update", "lamb_update", "lamb_apply"])
@pytest.mark.parametrize(
    ("nvlamb", "flagged", "rounded"),
    [(True, True, False), (False, False, True), pytest.param(False, False, False, marks=pytest.mark.exhaustive)],
)
def test_opcheck(op, nvlamb, flagged, rounded):
    params, grads = tensors(0, torch.bfloat16 if rounded else torch.float32), tensors(1, torch.bfloat16)
    moments = [[torch.rand(p.shape, dtype=torch.bfloat16) for p in params] for _ in range(2)]
    state = [*moments, [torch.ones(()) for _ in params]]
    numbers, norms = (*BETAS, EPS), torch.rand(len(params), 2)
    flags = (torch.tensor(2.0), torch.tensor(0.0)) if flagged else (None, None)
    rounding = ([1, 2, 3, 4], [0, 8, 0, 0]) if rounded else ([], [])
    arguments = {
        "adamw_update": (params, grads, *state, LRS, DECAYS, numbers, *flags, *rounding),
        "lamb_update": (params, grads, *state, DECAYS, numbers, nvlamb, *flags),
        "lamb_apply": (params, *state, norms, LRS, DECAYS, numbers, nvlamb, flags[1], *rounding),
    }
    assert_opcheck(getattr(torch.ops.evakernels, op).default, arguments[op])


# --- measured steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [AdamW, Lamb, partial(Lamb, variant="deepspeed")])
@pytest.mark.kernels("newest triton")
def test_measured_step_is_bit_equal(kind, dtype):
    """It returns the squared norms of each parameter and of its change."""
    plain, measured = (optimizer_of(tensors(0, dtype), kind) for _ in range(2))
    for seed in (1, 2, 3):
        before = [param.detach().double() for param in parameters(measured)]
        step(plain, tensors(seed))
        for param, grad in zip(parameters(measured), tensors(seed), strict=True):
            param.grad = grad.to(dtype)
        found = measured.measured_step()
        for param, expected, old in zip(parameters(measured), parameters(plain), before, strict=True):
            assert torch.equal(param, expected)
            assert all(torch.equal(value, plain.state[expected][name]) for name, value in measured.state[param].items())
            squares = torch.stack([old.square().sum(), (param.detach().double() - old).square().sum()])
            # A difference of two numbers is rounded to their dtype.
            tolerance = 1e-4 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(found[param].double(), squares, rtol=tolerance, atol=1e-12)


def test_measured_step_skipped_or_without_gradient():
    optimizer = optimizer_of(tensors(0), AdamW)
    first, *others = parameters(optimizer)
    for param in others:
        param.grad = torch.ones_like(param)
    optimizer.found_inf = torch.ones(())
    found = optimizer.measured_step()
    assert set(found) == set(others)
    assert all(squares[1] == 0 for squares in found.values())
    with pytest.raises(NotImplementedError, match="FusedLAMB has no measured_step"):
        FusedLAMB([first]).measured_step()


@every_optimizer
def test_measured_step_of_shards(kind, one_process):
    mesh, results = init_device_mesh("cpu", (1,)), []
    whole = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    for param in (whole.clone(), distribute_tensor(whole.clone(), mesh, [Shard(0)])):
        param.requires_grad_().grad = torch.ones_like(param)
        results.append(list(kind([param], lr=0.1).measured_step().values()))
    torch.testing.assert_close(results[1], results[0])


# --- wrong input ------------------------------------------------------------------------------------------------------

ONE = [nn.Parameter(torch.ones(3))]


@every_optimizer
@pytest.mark.parametrize(
    ("exception", "name", "params", "options"),
    [
        (ValueError, "lr", ONE, {"lr": -1.0}),
        (ValueError, "lr", ONE, {"lr": torch.tensor(-1.0)}),
        (TypeError, "lr", ONE, {"lr": torch.ones(2)}),
        (TypeError, "weight_decay", ONE, {"weight_decay": torch.ones(())}),
        (ValueError, "weight_decay", [{"params": ONE, "weight_decay": -0.1}], {}),
        (ValueError, "eps", ONE, {"eps": -1e-6}),
        (ValueError, "betas", ONE, {"betas": (0.9, 1.0)}),
        (ValueError, "amsgrad", ONE, {"amsgrad": True}),
        (ValueError, "differentiable", ONE, {"differentiable": True}),
        (TypeError, "stochastic_rounding", ONE, {"stochastic_rounding": True}),
        (ValueError, "parameter 1 of a group", [*ONE, nn.Parameter(torch.ones(1).expand(3))], {}),
        (ValueError, "b must", [("b", torch.ones(1, 2).expand(3, 2))], {}),
        (ValueError, "seed", ONE, {"seed": -1}),
    ],
)
def test_wrong_option_is_named(kind, exception, name, params, options):
    with pytest.raises(exception, match=f"^{kind.__name__}: {name}"):
        kind(params, **options)


@every_optimizer
def test_the_state_of_another_optimizer_is_refused(kind):
    other = optimizer_of(tensors(0), lambda groups, betas, eps: torch.optim.SGD(groups, momentum=0.9))
    step(other, tensors(1))
    with pytest.raises(ValueError, match="state must be"):
        kind(other.param_groups).load_state_dict(other.state_dict())


@every_optimizer
@pytest.mark.parametrize(
    ("name", "param", "grad"),
    [
        (r"grads\[0\]", torch.ones(3, 3), torch.eye(3).to_sparse()),
        (r"params\[0\]", torch.ones(3) + 0j, torch.ones(3) + 0j),
    ],
)
def test_wrong_gradient_or_parameter_is_named(kind, name, param, grad):
    param = nn.Parameter(param)
    param.grad = grad
    with pytest.raises(TypeError, match=name):
        kind([param]).step()


def test_what_one_optimizer_alone_refuses():
    with pytest.raises(ValueError, match="AdamW: amsgrad"):
        AdamW(ONE).load_state_dict(torch.optim.AdamW(ONE, amsgrad=True).state_dict())
    with pytest.raises(ValueError, match="variant must be"):
        Lamb(ONE, variant="nvlam")
