"""Every family compared with its untouched model: features, gradients, ops."""

import copy

import pytest
import torch
from dropin_families import FAMILIES, assert_same_gradients, gradients, ops_of, pair, run

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
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.exhaustive)])
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
