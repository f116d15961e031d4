import copy

import pytest
import torch
from op_checks import assert_opcheck
from optimizer_checks import BETAS, DECAYS, EPS, LRS, assert_compiles_in_place, optimizer_of, parameters, step, tensors
from torch import nn

import evakernels
from evakernels.optim import Lamb

OPS = torch.ops.evakernels
VARIANTS = ["deepspeed", "nvlamb"]


def lamb_of(params: list[torch.Tensor], variant: str, *rates: list[float]) -> Lamb:
    return optimizer_of(params, Lamb, *rates, variant=variant)


def deepspeed_by_hand(params, all_grads):
    """The formula in plain numbers, one tensor after another."""
    for w, lr, decay, grads in zip(params, LRS, DECAYS, zip(*all_grads, strict=True), strict=True):
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for t, g in enumerate(grads, start=1):
            m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g**2
            u = m / (v**0.5 + EPS) + decay * w
            w_norm, u_norm = (w**2).sum() ** 0.5, (u**2).sum() ** 0.5
            ratio = min(max((w_norm / u_norm).item(), 0.01), 10.0) if w_norm * u_norm > 0 else 1.0
            w = w - lr * (1 - 0.98**t) ** 0.5 / (1 - 0.9**t) * ratio * u
        yield w


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_deepspeed_equals_the_formula(dtype, tolerance):
    params, all_grads = tensors(0), [tensors(seed) for seed in range(1, 6)]
    optimizer = lamb_of([p.to(dtype) for p in params], "deepspeed")
    for grads in all_grads:
        step(optimizer, grads)
    for got, expected in zip(parameters(optimizer), deepspeed_by_hand(params, all_grads), strict=True):
        torch.testing.assert_close(got.detach().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_nvlamb_equals_timm(dtype, tolerance):
    optim = pytest.importorskip("timm.optim")
    ours = lamb_of(tensors(0, dtype), "nvlamb")
    groups = copy.deepcopy([{k: g[k] for k in ("params", "lr", "weight_decay")} for g in ours.param_groups])
    theirs = optim.Lamb(groups, betas=BETAS, eps=EPS, max_grad_norm=None)
    for seed in range(1, 6):
        step(ours, tensors(seed, dtype))
        step(theirs, tensors(seed, dtype))
    for got, expected in zip(parameters(ours), parameters(theirs), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("size", "ratio"), [(1e-6, 0.01), (1e6, 10.0)])
def test_the_ratio_is_clipped_in_deepspeed_only(size, ratio):
    start = torch.full((4,), size, dtype=torch.float64)
    for variant in VARIANTS:
        optimizer = lamb_of([start], variant, [0.1], [1e-9])
        step(optimizer, [torch.ones(4, dtype=torch.float64)])
        moved = (start - parameters(optimizer)[0].detach()) / 0.1
        if variant == "deepspeed":
            # At step 1 the direction is 0.1 / sqrt(0.02) and the correction its inverse.
            torch.testing.assert_close(moved, torch.full_like(start, ratio), rtol=2e-3, atol=0)
        else:
            torch.testing.assert_close(moved, start, rtol=2e-3, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_zero_norm_gives_the_ratio_one(variant):
    zero, one = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    optimizer = lamb_of([zero, one], variant, [0.1, 0.1], [0.5, 0.0])
    step(optimizer, [one, zero])  # a parameter without norm, a direction without norm
    moved, kept = parameters(optimizer)
    torch.testing.assert_close(moved.detach(), -0.1 * one, rtol=1e-4, atol=0)
    assert torch.equal(kept, one)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shards_reduce_their_norms_between_the_phases(variant):
    def run(shards):
        """Both phases, on each shard with the norms of all."""
        states = [[[w], [g], [torch.zeros_like(w)], [torch.zeros_like(w)], [torch.zeros(())]] for w, g in shards]
        options = {"betas": BETAS, "eps": EPS, "variant": variant}
        norms = sum(evakernels.lamb_update(*state, [0.1], **options) for state in states)
        for w, _, m, v, t in states:
            evakernels.lamb_apply(w, m, v, t, norms, [0.3], [0.1], **options)
        return torch.cat([state[0][0] for state in states])

    w, g = (torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    pieces = [slice(0, 2), slice(2, 2), slice(2, 9)]  # one rank holds nothing of this tensor
    torch.testing.assert_close(run([(w[p].clone(), g[p]) for p in pieces]), run([(w.clone(), g)]), rtol=1e-13, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skipped", [False, True])
def test_one_call_is_both_phases_to_the_bit(variant, dtype, skipped):
    """Also where a backend makes the step of a few tensors after that of others: these have one of 70,000."""

    def inputs():
        draw = torch.Generator().manual_seed(0)
        sizes = [(70_000,), (3, 5), (0,), (9_001,), (50_000,)]
        params, grads = ([torch.randn(size, generator=draw).to(dtype) for size in sizes] for _ in range(2))
        moments = [[torch.rand(size, generator=draw) for size in sizes] for _ in range(2)]
        return [params, grads, *moments, [torch.full((), 3.0) for _ in sizes]]

    lrs, decays = [0.1, 0.2, 0.1, 0.3, 0.1], [0.1, 0.0, 0.1, 0.05, 0.1]
    options = {"betas": BETAS, "eps": EPS, "variant": variant, "found_inf": torch.tensor(float(skipped))}
    scale = torch.tensor(4.0)
    at_once, apart = inputs(), inputs()
    evakernels.lamb_step(*at_once, lrs, decays, grad_scale=scale, **options)
    norms = evakernels.lamb_update(*apart, decays, grad_scale=scale, **options)
    evakernels.lamb_apply(apart[0], *apart[2:], norms, lrs, decays, **options)
    pairs = [pair for lists in zip(at_once, apart, strict=True) for pair in zip(*lists, strict=True)]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert skipped == torch.equal(at_once[0][0], inputs()[0][0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_low_precision_rounds_only_what_is_stored(param_dtype, state_dtype, variant):
    params, grads = tensors(0, param_dtype), tensors(1, param_dtype)
    state = [[torch.zeros_like(p, dtype=state_dtype) for p in params] for _ in range(2)]
    exact = ([p.double() for p in params], [g.double() for g in grads], *([s.double() for s in half] for half in state))
    options = {"betas": BETAS, "eps": EPS, "variant": variant}
    for w, g, m, v in ((params, grads, *state), exact):
        steps = [torch.zeros(()) for _ in w]
        norms = evakernels.lamb_update(w, g, m, v, steps, DECAYS, **options)
        evakernels.lamb_apply(w, m, v, steps, norms, LRS, DECAYS, **options)
    for got, expected in zip(params, exact[0], strict=True):
        # The state is rounded before it is used; its error moves the parameter by a share of its step.
        slack = torch.finfo(param_dtype).eps + 0.3 * torch.finfo(state_dtype).eps
        torch.testing.assert_close(got.double(), expected, rtol=slack, atol=slack)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("first", [True, False])
def test_found_inf_skips_the_step_and_does_not_count_it(variant, first):
    skipped, plain = (lamb_of(tensors(0), variant) for _ in range(2))
    bad = [g * torch.inf for g in tensors(9)]
    for k in (1, 2):
        if first or k == 2:
            skipped.found_inf = torch.tensor(1.0)
            step(skipped, bad)
        skipped.found_inf = torch.tensor(0.0)
        for optimizer in (skipped, plain):
            step(optimizer, tensors(k))
    for a, b in zip(parameters(skipped), parameters(plain), strict=True):
        assert torch.equal(a, b)
        assert skipped.state[a]["step"] == plain.state[b]["step"] == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_grad_scale_divides_the_gradients(variant):
    scaled, plain = (lamb_of(tensors(0), variant) for _ in range(2))
    scaled.grad_scale = torch.tensor(8.0)
    grads = [8 * g for g in tensors(1)]
    step(scaled, grads)
    step(plain, tensors(1))
    for a, b, g in zip(parameters(scaled), parameters(plain), grads, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, g)


@pytest.mark.parametrize("variant", VARIANTS)
def test_maximize_is_a_step_down_the_negative_gradient(variant):
    up, down = (lamb_of(tensors(0), variant) for _ in range(2))
    for group in up.param_groups:
        group["maximize"] = True
    step(up, tensors(1))
    step(down, [-g for g in tensors(1)])
    for got, expected in zip(parameters(up), parameters(down), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_is_bit_exact(variant, dtype, tmp_path):
    straight, first = (lamb_of(tensors(0, dtype), variant) for _ in range(2))
    for seed in range(1, 4):
        step(straight, tensors(seed))
        step(first, tensors(seed))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = lamb_of(parameters(first), variant)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in range(4, 7):
        step(straight, tensors(seed))
        step(second, tensors(seed))
    for a, b in zip(parameters(straight), parameters(second), strict=True):
        assert torch.equal(a, b)
        assert second.state[b]["exp_avg"].dtype == torch.float32
    assert second.state_dict()["param_groups"] == straight.state_dict()["param_groups"]


def test_a_parameter_without_gradient_is_left_alone():
    optimizer = lamb_of(tensors(0), "deepspeed")
    used, unused = parameters(optimizer)[:2]
    before = unused.clone()
    optimizer.step()
    assert not optimizer.state
    used.grad = torch.ones_like(used)
    optimizer.step()
    assert torch.equal(unused, before)
    assert list(optimizer.state) == [used]


def test_the_closure_runs_with_gradients_and_its_loss_is_returned():
    optimizer = lamb_of(tensors(0), "deepspeed")
    before = [p.clone() for p in parameters(optimizer)]

    def closure():
        loss = sum(p.square().sum() for p in parameters(optimizer))
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    torch.testing.assert_close(loss.detach(), sum(p.square().sum() for p in before).detach())
    assert not any(torch.equal(a, b) for a, b in zip(before, parameters(optimizer), strict=True))


@pytest.mark.parametrize("nvlamb", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("flagged", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_opcheck(nvlamb, flagged):
    params, grads = tensors(0, torch.float32), tensors(1, torch.bfloat16)
    moments = [[torch.rand(p.shape, dtype=torch.bfloat16) for p in params] for _ in range(2)]
    steps = [torch.ones(()) for _ in params]
    grad_scale, found_inf = (torch.tensor(2.0), torch.tensor(0.0)) if flagged else (None, None)
    options = ((*BETAS, EPS), nvlamb)
    assert_opcheck(OPS.lamb_update.default, (params, grads, *moments, steps, DECAYS, *options, grad_scale, found_inf))
    norms = torch.rand(len(params), 2)
    assert_opcheck(OPS.lamb_apply.default, (params, *moments, steps, norms, LRS, DECAYS, *options, found_inf, [], []))
    step_arguments = (params, grads, *moments, steps, LRS, DECAYS, *options, grad_scale, found_inf, [], [])
    assert_opcheck(OPS.lamb_step.default, step_arguments)


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_graph_break(variant):
    def both_phases(params, grads, exp_avgs, exp_avg_sqs, steps):
        options = {"betas": BETAS, "eps": EPS, "variant": variant}
        norms = evakernels.lamb_update(params, grads, exp_avgs, exp_avg_sqs, steps, DECAYS, **options)
        evakernels.lamb_apply(params, exp_avgs, exp_avg_sqs, steps, norms, LRS, DECAYS, **options)
        return norms

    assert_compiles_in_place(both_phases)


def with_gradient(param: torch.Tensor, grad: torch.Tensor) -> Lamb:
    param = nn.Parameter(param)
    param.grad = grad
    return Lamb([param])


def update(**changes):
    one = {name: [torch.ones(3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    arguments = {**one, "steps": [torch.zeros(())], "weight_decays": [0.0], **changes}
    return evakernels.lamb_update(**arguments, betas=BETAS, eps=EPS)


ONE = [nn.Parameter(torch.ones(3))]


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (lambda: Lamb(ONE, lr=-1.0), ValueError, "Lamb: lr is -1.0; accepted: 0 or more"),
        (lambda: Lamb(ONE, lr=float("nan")), ValueError, "lr is nan"),
        (
            lambda: Lamb(ONE, lr=torch.ones(2)),
            TypeError,
            r"Lamb: lr is a tensor of shape \(2,\) on cpu; accepted: a num",
        ),
        (lambda: Lamb(ONE, amsgrad=True), ValueError, "Lamb: amsgrad is True; accepted: False"),
        (lambda: Lamb(ONE, eps=-1e-6), ValueError, "eps is -1e-06"),
        (lambda: Lamb([{"params": ONE, "weight_decay": -0.1}]), ValueError, "weight_decay is -0.1"),
        (lambda: Lamb(ONE, betas=(0.9, 1.0)), ValueError, r"betas are \(0.9, 1.0\)"),
        (lambda: Lamb(ONE, variant="nvlam"), ValueError, "accepted: 'deepspeed', 'nvlamb'; did you mean 'nvlamb'"),
        (
            with_gradient(torch.ones(3, 2), torch.eye(3, 2).to_sparse()).step,
            TypeError,
            r"grads\[0\] is torch.sparse_coo; accepted: dense",
        ),
        (with_gradient(torch.ones(3) + 0j, torch.ones(3) + 0j).step, TypeError, r"params\[0\] is torch.complex64"),
        (lambda: update(params=[]), ValueError, "params is empty"),
        (lambda: update(grads=[]), ValueError, "grads has 0 entries; expected one for each of the 1 params"),
        (lambda: update(exp_avgs=[torch.ones(4)]), ValueError, r"exp_avgs\[0\] has shape \(4,\)"),
        (lambda: update(grads=[torch.ones(3, device="meta")]), ValueError, r"grads\[0\] on meta"),
        (lambda: update(weight_decays=[0.0, 0.0]), ValueError, "weight_decays has 2 entries"),
        (lambda: update(steps=[torch.tensor(1)]), TypeError, r"steps\[0\] is torch.int64 \(\); accepted: 0-D float32"),
        (lambda: update(found_inf=torch.zeros(2)), ValueError, r"found_inf has shape \(2,\); expected one element"),
    ],
)
def test_wrong_input_says_what_is_accepted(call, exception, message):
    with pytest.raises(exception, match=message):
        call()
