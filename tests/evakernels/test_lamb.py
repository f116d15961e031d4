import pytest
import torch
from optimizer_checks import (
    BETAS,
    CALL,
    DECAYS,
    EPS,
    LRS,
    VARIANTS,
    assert_compiles_in_place,
    everything,
    lists,
    optimizer_of,
    parameters,
    step,
    tensors,
)

import evakernels
from evakernels.optim import Lamb

pytestmark = pytest.mark.kernels("newest triton")


def lamb_of(params: list[torch.Tensor], variant: str, *rates: list[float]) -> Lamb:
    return optimizer_of(params, Lamb, *rates, variant=variant)


def by_hand(variant, params, all_grads):
    """The formulas in plain numbers, one tensor after another; the paper's ratio is 1 without weight decay."""
    deepspeed = variant == "deepspeed"
    for w, lr, decay, grads in zip(params, LRS, DECAYS, zip(*all_grads, strict=True), strict=True):
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for t, g in enumerate(grads, start=1):
            m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g**2
            corrections = 1 - 0.9**t, 1 - 0.98**t
            a, b = (m, v) if deepspeed else (m / corrections[0], v / corrections[1])
            u = a / (b**0.5 + EPS) + decay * w
            w_norm, u_norm = (w**2).sum() ** 0.5, (u**2).sum() ** 0.5
            ratio = (w_norm / u_norm).item() if w_norm * u_norm > 0 else 1.0
            if deepspeed:
                ratio = min(max(ratio, 0.01), 10.0) * corrections[1] ** 0.5 / corrections[0]
            w = w - lr * (ratio if deepspeed or decay else 1.0) * u
        yield w


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("options", [{}, {"variant": "deepspeed"}], ids=["default", "deepspeed"])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
@pytest.mark.kernels
def test_lamb_equals_the_formula(size, options, dtype, tolerance):
    """Includes parameters with a trust ratio that DeepSpeed's form clips."""
    params, all_grads = [size * param for param in tensors(0)], [tensors(seed) for seed in range(1, 6)]
    optimizer = optimizer_of([p.to(dtype) for p in params], Lamb, **options)
    for grads in all_grads:
        step(optimizer, grads)
    expected = by_hand(options.get("variant"), params, all_grads)
    for got, exact in zip(parameters(optimizer), expected, strict=True):
        torch.testing.assert_close(got.detach().double(), exact, rtol=tolerance, atol=tolerance)


def test_state_dict_keeps_its_variant():
    """A run of the former default goes on in DeepSpeed's form."""
    former, resumed = lamb_of(tensors(0), "deepspeed"), optimizer_of(tensors(0), Lamb)
    resumed.load_state_dict(former.state_dict())
    for optimizer in (former, resumed):
        step(optimizer, tensors(1))
    for got, expected in zip(parameters(resumed), parameters(former), strict=True):
        assert torch.equal(got, expected)


def test_lazy_clone_leaves_the_original():
    """Copy-on-write memory is copied before it is written."""
    originals = torch.ones(5), torch.ones(5), torch.ones(5), torch.ones(())
    params, *state = ([torch._lazy_clone(original)] for original in originals)
    evakernels.lamb_step(params, [torch.full((5,), 3.0)], *state, [0.1], [0.01], betas=BETAS, eps=EPS)
    for (changed,), original in zip((params, *state), originals, strict=True):
        assert not (changed == 1).any()
        assert (original == 1).all()


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

    lrs, decays = [0.1, 0.2, 0.1, 0.3, 0.1], [0.1, 0.0, 0.1, 0.05, 0.1]
    options = {"betas": BETAS, "eps": EPS, "variant": variant, "found_inf": torch.tensor(float(skipped))}
    dtypes, sizes, scale = (
        (dtype, dtype, torch.float32, torch.float32),
        [70_000, 15, 0, 9_001, 50_000],
        torch.tensor(4.0),
    )
    before, at_once, apart = (lists(dtypes, sizes) for _ in range(3))
    evakernels.lamb_step(*at_once, lrs, decays, grad_scale=scale, **options)
    norms = evakernels.lamb_update(*apart, decays, grad_scale=scale, **options)
    evakernels.lamb_apply(apart[0], *apart[2:], norms, lrs, decays, **options)
    assert all(map(torch.equal, everything(at_once), everything(apart)))
    assert skipped == torch.equal(at_once[0][0], before[0][0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_graph_break(variant):
    def both_phases(params, grads, exp_avgs, exp_avg_sqs, steps):
        options = {"betas": BETAS, "eps": EPS, "variant": variant}
        norms = evakernels.lamb_update(params, grads, exp_avgs, exp_avg_sqs, steps, DECAYS, **options)
        evakernels.lamb_apply(params, exp_avgs, exp_avg_sqs, steps, norms, LRS, DECAYS, **options)
        return norms

    assert_compiles_in_place(both_phases)


CALLS = {
    "lamb_apply": CALL | {"squared_norms": torch.ones(1, 2), "lrs": [1.0]},
    "lamb_step": CALL | {"grads": [torch.ones(4)], "lrs": [1.0], "grad_scale": torch.ones(())},
    "lamb_update": CALL | {"grads": [torch.ones(4)], "grad_scale": torch.ones(())},
}
"""For test_wrong_input."""
