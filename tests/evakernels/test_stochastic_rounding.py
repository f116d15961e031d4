"""Stochastic rounding of bfloat16 parameters: its random numbers, the ops on every backend, and what it is for."""

from itertools import pairwise

import pytest
import torch
from on_device import COMPILED, DEVICE
from optimizer_checks import SIZES, everything, lists, update
from torch import nn

import evakernels
from evakernels import _native
from evakernels.optim import AdamW, Lamb
from evakernels.reference._optimizer import random_bits, round_stochastically

NATIVE = pytest.mark.skipif(not _native.LOADED, reason="the native library is not built")
BACKENDS = ["reference", pytest.param(COMPILED, marks=NATIVE)]
OPTIONS = {"betas": (0.9, 0.98), "eps": 1e-6}
FLOAT, HALF = torch.float32, torch.bfloat16
MIXED, ALL_HALF = (HALF, HALF, FLOAT, FLOAT), (HALF,) * 4
KINDS = ["adamw", "lamb_step", "lamb_phases"]


def step(state, kind, backend=COMPILED, seeds=None, firsts=(), lr=0.01, decay=0.05, **options):
    """One step in place on the lists, at the same rates for all."""
    count = len(state[0])
    seeds = [5 << 32 | i for i in range(count)] if seeds is None else seeds
    rates = {"lrs": [lr] * count, "decays": [decay] * count}
    update(state, kind, backend, **rates, **options, seeds=seeds, first_elements=firsts)


# --- the random numbers ---------------------------------------------------------------------------------------------


def bits(seed=0, step=1, first=0, size=1 << 18):
    return random_bits(torch.empty(size), seed, torch.tensor(float(step)), first).to(torch.int64) & 0xFFFFFFFF


def correlation(a, b):
    """In standard deviations of what independent numbers have."""
    a, b = (x.double() - (1 << 31) for x in (a, b))
    return ((a * b).mean() / (a.std() * b.std()) * len(a) ** 0.5).abs().item()


def test_random_bits_are_uniform_and_independent():
    numbers = bits()
    assert numbers.min() >= 0
    assert numbers.max() < 1 << 32
    planes = torch.stack([(numbers >> k & 1).double() for k in range(32)]) * 2 - 1
    products = planes @ planes.T / len(numbers) ** 0.5
    products.fill_diagonal_(0.0)
    assert (planes.sum(1) / len(numbers) ** 0.5).abs().max() < 5
    assert products.abs().max() < 5


@pytest.mark.parametrize(
    "other", [{"step": 2}, {"step": 3}, {"seed": 1}, {"seed": 2}, {"seed": 1 << 32}, {"seed": 3 << 32}], ids=str
)
def test_other_steps_and_seeds_have_other_numbers(other):
    ours, others = bits(), bits(**other)
    for shift in (0, 1, 2, 64):
        assert correlation(ours[: len(ours) - shift], others[shift:]) < 5, shift
    assert (ours == others).double().mean() < 1e-4


# --- a rounding -----------------------------------------------------------------------------------------------------


def test_bfloat16_values_and_nonfinite_stay():
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(HALF).float()
    rounded = round_stochastically(values, 3, torch.tensor(1.0), 0)
    torch.testing.assert_close(rounded, values, rtol=0, atol=0, equal_nan=True)
    odd = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7F7FFFFF], dtype=torch.int32).view(FLOAT)
    rounded = round_stochastically(odd, 3, torch.tensor(1.0), 0)
    assert rounded[:3].isnan().all()
    assert rounded[3] >= torch.finfo(HALF).max


# --- the ops --------------------------------------------------------------------------------------------------------


def assert_same_but_for_few(ours, theirs, slack):
    """Where float32 differs in the last place, another one of the two neighbours may be taken, once in 2^16 units."""
    different = torch.cat([(a != b).flatten() for a, b in zip(ours, theirs, strict=True)]).double().mean()
    assert different < 1e-3, different
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=torch.finfo(HALF).eps, atol=slack)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.kernels("triton")
def test_every_device_rounds_by_the_same_bits(kind, backend):
    """Of steps that float32 holds exactly: by 2^-12, from 1. The parameter decides nothing, its random bits all."""
    size, first = 3 * 16384 + 5, (1 << 33) + 77

    def rounded(device, backend):
        ones = [torch.ones(size, dtype=dtype, device=device) for dtype in MIXED]
        state = [[t] for t in ones] + [[torch.tensor(7.0, device=device)]]
        step(state, kind, backend, [3 << 40], [first], lr=2.0**-12, decay=0.0, betas=(0.0, 0.0), eps=0.0)
        return state[0][0].cpu()

    ours, expected = rounded(DEVICE, backend), rounded("cpu", "reference")
    assert torch.equal(ours, expected)
    assert expected.unique().tolist() == [1 - 2.0**-8, 1.0]


@NATIVE
@pytest.mark.parametrize("dtypes", [MIXED, ALL_HALF], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.kernels
def test_kernels_equal_the_formula_of_the_reference(kind, dtypes):
    firsts = [1000 * i for i in range(len(SIZES))]
    ours, theirs, nearest = (lists(dtypes) for _ in range(3))
    step(ours, kind, firsts=firsts)
    step(theirs, kind, "reference", firsts=firsts)
    step(nearest, kind, seeds=())
    # Of a parameter near 0; a moment in bfloat16 may itself be the other neighbour.
    assert_same_but_for_few(ours[0], theirs[0], 2e-6 if dtypes == MIXED else 2e-4)
    assert (ours[0][-1] != nearest[0][-1]).double().mean() > 0.1
    for a, b in zip(everything(ours[2:]), everything(nearest[2:]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.kernels("newest triton")
def test_stochastic_rounding_is_unbiased(kind, backend):
    """Of a tensor whose elements all make the same step."""
    size, exact = 1 << 17, None
    results = []
    for dtype in (FLOAT, HALF):
        state = [[torch.full((size,), x, dtype=dtype)] for x in (1.0, 0.5)]
        state += [[torch.full((size,), x)] for x in (0.1, 0.01)] + [[torch.tensor(7.0)]]
        step(state, kind, backend, seeds=[1] if dtype == HALF else ())
        results.append(state[0][0].double())
    exact, rounded = results
    assert exact.unique().numel() == 1
    unit = 2.0**-8
    share = exact[0].item() / unit % 1
    assert 0.01 < share < 0.99
    assert abs((rounded.mean() - exact[0]) / unit) < 5 * (share * (1 - share) / size) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_are_rounded_as_the_whole_is(backend):
    size = 2 * 16384 + 77
    whole = lists(MIXED, [size])
    cuts = [0, 1000, 1001, 16384 + 5, size]
    parts = [[t[0][a:b].clone() for a, b in pairwise(cuts)] for t in whole[:4]]
    parts.append([whole[4][0].clone() for _ in parts[0]])
    norms = torch.tensor([[3.0, 2.0]])
    for state, firsts in ((whole, [0]), (parts, cuts[:-1])):
        count = len(state[0])
        step(state, "adamw", backend, seeds=[9] * count, firsts=firsts)
        rounding = {"seeds": [8] * count, "first_elements": firsts}
        with evakernels.use_backend(backend):
            rates = [0.01] * count, [0.05] * count
            evakernels.lamb_apply(state[0], *state[2:], norms.expand(count, 2), *rates, **OPTIONS, **rounding)
    assert torch.equal(torch.cat(parts[0]), whole[0][0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seeds", "scale"), [(None, None), (None, float("nan")), ((), float("nan"))])
@pytest.mark.kernels("newest triton")
def test_found_inf_skips_the_update(kind, backend, seeds, scale):
    """Rounded stochastically or to the nearest; also in the first step."""
    skipped, before = (lists(MIXED, [0, 5, 1061]) for _ in range(2))
    for state in (skipped, before):
        state[1][1][2] = torch.inf
        state[4][1].zero_()
    step(skipped, kind, backend, seeds, found_inf=1.0, scale=scale)
    assert all(torch.equal(a, b) for a, b in zip(everything(skipped), everything(before), strict=True))


# --- the optimizers -------------------------------------------------------------------------------------------------


def losses(kind, dtype, steps=400, **options):
    """Of a linear regression whose steps are far below half a unit of bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(256, 16, generator=generator), torch.randn(16, 4, generator=generator)
    weight = nn.Parameter((target + 0.3 * torch.randn(16, 4, generator=generator)).to(dtype))
    optimizer = kind([weight], lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, **options)
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (x @ weight.float() - x @ target).square().mean()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


@pytest.mark.parametrize("kind", [AdamW, Lamb])
def test_training_follows_float32_not_bfloat16(kind):
    exact, plain = losses(kind, FLOAT), losses(kind, HALF)
    stochastic = losses(kind, HALF, stochastic_rounding=True)
    assert exact[-1] < 0.1 * exact[0]
    assert plain[-1] > 0.5 * plain[0]
    assert stochastic[-1] < exact[-1] + 0.02 * exact[0]
    assert max(abs(a - b) for a, b in zip(stochastic, exact, strict=True)) < 0.1 * exact[0]


@pytest.mark.parametrize("kind", [AdamW, Lamb])
@pytest.mark.kernels("newest triton")
def test_the_seed_and_nothing_else_decides(kind):
    runs = [losses(kind, HALF, 20, stochastic_rounding=True, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_parameters_of_other_groups_change_no_rounding():
    """Numbers are those of the optimizer's parameters, whatever calls of the op they are in."""

    def run(betas_of_first):
        params = [nn.Parameter(torch.ones(100, dtype=HALF)) for _ in range(2)]
        groups = [{"params": params[:1], "betas": betas_of_first}, {"params": params[1:]}]
        optimizer = AdamW(groups, lr=1e-3, betas=(0.9, 0.98), stochastic_rounding=True)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        return params

    together, apart = run((0.9, 0.98)), run((0.5, 0.5))
    assert torch.equal(together[1], apart[1])
    assert not torch.equal(together[0], together[1])


def test_groups_of_other_dtypes_may_switch_it_off():
    params = [nn.Parameter(torch.ones(100, dtype=dtype)) for dtype in (HALF, FLOAT)]
    groups = [{"params": params[:1]}, {"params": params[1:], "stochastic_rounding": False}]
    optimizer = Lamb(groups, lr=1e-3, stochastic_rounding=True)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert params[0].unique().numel() == 2
    assert params[1].unique().numel() == 1


def test_old_state_dict_gets_default_options():
    weight = nn.Parameter(torch.ones(3, dtype=HALF))
    saved = torch.optim.AdamW([weight]).state_dict()
    optimizer = AdamW([weight], stochastic_rounding=True, seed=4)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["stochastic_rounding"]
    assert optimizer.param_groups[0]["seed"] == 4
