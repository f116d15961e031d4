"""Every family compared with its untouched model: features, gradients, a training run."""

import copy

import pytest
import torch
from dropin_families import FAMILIES, assert_same_gradients, pair
from dropin_family import gradients, ops_of, run

# Steps are slow, and gradients are compared for every family.
TRAINED = ("vit", "eva02", "clip", "open-clip-eva", "siglip2")

every_family = pytest.mark.parametrize("name", FAMILIES)
both_modes = pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])


def _assert_close(actual, expected, bound):
    """To `bound` of the largest value: a feature near zero is a difference of larger ones."""
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=bound * float(expected.detach().abs().max().clamp_min(1e-6))
    )


@every_family
@both_modes
def test_features_match_untouched(name, training):
    """With gradients and without."""
    family, model, untouched = pair(name)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            actual, expected = (run(family, m.train(training), 1) for m in (model, untouched))
        _assert_close(actual, expected, 1e-5)


@every_family
def test_gradients_match_untouched(name):
    family, model, untouched = pair(name)
    actual, expected = (gradients(family, m.train(), 2) for m in (model, untouched))
    assert list(actual) == list(expected)
    assert_same_gradients(actual, expected)


@every_family
def test_model_runs_on_the_ops(name):
    family, model, untouched = pair(name)
    assert ops_of(family, model.train()) == family.ops
    assert ops_of(family, untouched.train()) == set()


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_error_matches_untouched(name, dtype):
    family, model, untouched = pair(name)
    with torch.no_grad():
        exact = run(family, untouched, 1)
        errors = []
        for m in (model, copy.deepcopy(untouched)):
            cast = m.to(dtype)
            inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in family.inputs(1).items()}
            errors.append(float((family.features(cast, inputs).float() - exact).norm()))
    assert errors[0] <= 1.5 * errors[1]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in TRAINED else pytest.mark.exhaustive) for name in FAMILIES]
)
def test_training_follows_untouched(name):
    family, model, untouched = pair(name)
    curves = []
    for m in (model, untouched):
        m.train()
        optimizer = torch.optim.AdamW(m.parameters(), lr=3e-4)
        curve = []
        for step in range(15):
            out = run(family, m, step % 5)
            target = torch.randn(out.shape[-1], generator=torch.Generator().manual_seed(step % 5))
            loss = (out.mean(tuple(range(out.dim() - 1))) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
        curves.append(curve)
    ours, theirs = map(torch.tensor, curves)
    assert theirs[-5:].mean() < theirs[:5].mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
