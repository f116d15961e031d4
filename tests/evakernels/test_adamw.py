"""AdamW: the op on every backend, and the optimizer beside torch's own."""

import inspect

import optimizer_checks
import pytest
import torch
from optimizer_checks import (
    BETAS,
    BUFFERS,
    CALL,
    DECAYS,
    EPS,
    LRS,
    MIXES,
    SIZES,
    assert_same_state,
    lists,
    optimizer_of,
    step,
    tensors,
    update,
)
from torch import nn

import evakernels
from evakernels.optim import AdamW

# --- the op ---------------------------------------------------------------------------------------------------------


def by_torch(state, scale=1.0):
    """The same from torch's optimizer in float64."""
    params, grads, exp_avgs, exp_avg_sqs, steps = state
    leaves = [nn.Parameter(p.double()) for p in params]
    groups = [
        {"params": [p], "lr": 0.01 * (i + 1), "weight_decay": 0.0 if i == 1 else 0.05} for i, p in enumerate(leaves)
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
    for leaf, g, m, v, t in zip(leaves, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        leaf.grad = g.double() / scale
        optimizer.state[leaf] = {"step": t.clone(), "exp_avg": m.double(), "exp_avg_sq": v.double()}
    optimizer.step()
    moments = [[optimizer.state[leaf][name] for leaf in leaves] for name in ("exp_avg", "exp_avg_sq", "step")]
    return [[leaf.detach() for leaf in leaves], [g.double() for g in grads], *moments]


@pytest.mark.parametrize("flags", [{}, {"scale": 3.0}, {"scale": 8.0, "found_inf": 0.0}])
@pytest.mark.kernels("triton")
def test_adamw_matches_formula_of_torch(flags):
    state = lists(sizes=[*SIZES, 2**18 + 5])
    expected = by_torch(state, flags.get("scale", 1.0))
    update(state, "adamw", **flags)
    optimizer_checks.assert_states_close(state, [[t.float() for t in buffers] for buffers in expected])


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
def test_adamw_every_mix_of_dtypes(dtypes):
    state = lists(dtypes, [1061, 5])
    expected = by_torch(state)
    update(state, "adamw")
    for name, got, exact in zip(BUFFERS, state, expected, strict=False):
        for a, b in zip(got, exact, strict=True):
            unit = torch.finfo(a.dtype).eps
            torch.testing.assert_close(a.double(), b, rtol=unit + 2e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.kernels("triton")
def test_kernels_are_as_accurate_as_torch():
    state, peer = lists(sizes=[100_003]), lists(sizes=[100_003])
    exact = by_torch(state)
    update(state, "adamw")
    params, grads, exp_avgs, exp_avg_sqs, steps = peer
    torch._fused_adamw_(
        params, grads, exp_avgs, exp_avg_sqs, [], steps, lr=0.01, beta1=BETAS[0], beta2=BETAS[1], weight_decay=0.05,
        eps=EPS, amsgrad=False, maximize=False,
    )  # fmt: skip
    for name, got, theirs, truth in zip(BUFFERS, state, peer, exact, strict=False):
        error, torchs = ((t[0].double() - truth[0]).abs().max().item() for t in (got, theirs))
        # One unit in the last place of the largest value, as in op_checks.
        slack = torch.finfo(torch.float32).eps * truth[0].abs().max().item()
        assert error <= 2 * torchs + slack, (name, error, torchs)


def test_compiles_without_graph_break():
    def clipped_step(params, grads, exp_avgs, exp_avg_sqs, steps):
        norm = evakernels.gradient_norm(grads)
        flags = {"grad_scale": norm.clamp(min=1.0), "found_inf": (~norm.isfinite()).float()}
        evakernels.adamw_update(params, grads, exp_avgs, exp_avg_sqs, steps, LRS, DECAYS, betas=BETAS, eps=EPS, **flags)
        return norm

    optimizer_checks.assert_compiles_in_place(clipped_step)


# --- the optimizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("fused", [True, False])
def test_the_optimizer_equals_torchs(fused, dtype, tolerance):
    ours, theirs = optimizer_of(tensors(0, dtype)), optimizer_of(tensors(0, dtype), torch.optim.AdamW, fused=fused)
    for seed in range(1, 6):
        for optimizer in (ours, theirs):
            step(optimizer, tensors(seed, dtype))
    assert_same_state(ours, theirs, tolerance)


def test_its_arguments_are_torchs():
    """And those of its own behind them."""
    ours, theirs = (list(inspect.signature(kind).parameters.values()) for kind in (AdamW, torch.optim.AdamW))
    described = [[(p.name, p.kind, p.default) for p in given] for given in (ours, theirs)]
    assert described[0][: len(theirs)] == described[1]


@pytest.mark.parametrize("options", [{"fused": True}, {"fused": False, "capturable": True}, {"foreach": True}], ids=str)
def test_torchs_step_switches_are_accepted(options):
    ours, plain = optimizer_of(tensors(0), **options), optimizer_of(tensors(0))
    for optimizer in (ours, plain):
        step(optimizer, tensors(1))
    assert_same_state(ours, plain, 0)


def test_a_rate_may_be_a_tensor_which_schedulers_write():
    ours, theirs = ([nn.Parameter(t) for t in tensors(0)] for _ in range(2))
    ours, theirs = (
        kind(p, lr=torch.tensor(0.1, dtype=torch.float64)) for kind, p in ((AdamW, ours), (torch.optim.AdamW, theirs))
    )
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in (ours, theirs)]
    for seed in (1, 2, 3):
        for optimizer, schedule in zip((ours, theirs), schedules, strict=True):
            step(optimizer, tensors(seed))
            schedule.step()
    assert isinstance(ours.param_groups[0]["lr"], torch.Tensor)
    assert_same_state(ours, theirs, 1e-12)


# --- wrong input, for test_wrong_input ------------------------------------------------------------------------------

CALLS = {"adamw_update": CALL | {"grads": [torch.ones(4)], "lrs": [1.0], "grad_scale": torch.ones(())}}
TWICE = {name: 2 * CALLS["adamw_update"][name] for name in (*BUFFERS, "steps", "lrs", "weight_decays")}
WRONG = {
    "adamw_update": [
        (ValueError, "lrs", {"lrs": [0.1, 0.2]}),
        (TypeError, "lrs", {"lrs": 0.1}),
        (ValueError, "weight_decays", {"weight_decays": [0.0, 0.0]}),
        (ValueError, "steps", TWICE),
        (TypeError, "betas", {"betas": "ab"}),
        (TypeError, "betas", {"betas": 0.9}),
        (TypeError, r"params\[0\]", {"seeds": [1]}),
        (ValueError, "seeds", {"params": [torch.ones(4).half()], "seeds": [1, 2]}),
        (ValueError, "first_elements", {"seeds": [1], "first_elements": [1, 2]}),
        (ValueError, "first_elements", {"first_elements": [1]}),
        (ValueError, "seeds", {"seeds": [-1]}),
    ]
}
