"""open_clip's losses, on one rank and on several, with each exchange of features."""

import copy

import pytest
import torch
from dropin_families import log_ops
from open_clip.loss import ClipLoss, CoCaLoss, SigLipLoss
from rank_tests import results_of_ranks

import evakernels

ROWS, WIDTH, WORLD = 5, 8, 3
CLIP_MODES = [{"local_loss": a, "gather_with_grad": b} for a in (False, True) for b in (False, True)]
SIGLIP_MODES = [{"dist_impl": name} for name in ("bidir", "shift", "reduce", "gather")]


def _inputs(rank=0, dtype=torch.float32, bias=False):
    generator = torch.Generator().manual_seed(rank)
    features = [torch.randn(ROWS, WIDTH, generator=generator, dtype=dtype).requires_grad_() for _ in range(2)]
    scalars = [torch.tensor(1.3, requires_grad=True)] + [torch.tensor([-0.7], requires_grad=True)] * bias
    return [*features, *scalars]


def _value_and_gradients(loss, inputs):
    value = loss(*inputs)
    return [value, *torch.autograd.grad(value, inputs)]


def _assert_same(ours, theirs, inputs):
    report = evakernels.accelerate(ours, force=True)
    assert [done.module for done in report.replaced] == [type(theirs).__name__]
    for actual, expected in zip(*(_value_and_gradients(loss, inputs) for loss in (ours, theirs)), strict=True):
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "bias", "op"), [(ClipLoss, False, "contrastive"), (SigLipLoss, True, "siglip")])
def test_loss_runs_on_the_op(kind, bias, op):
    loss = kind()
    _assert_same(loss, kind(), _inputs(bias=bias))
    with log_ops() as ops:
        out = loss(*_inputs(bias=bias), output_dict=True)
    assert list(out) == ["contrastive_loss"]
    assert ops == {op}
    evakernels.restore(loss)
    with log_ops() as ops:
        loss(*_inputs(bias=bias))
    assert not ops


@pytest.mark.parametrize(("kind", "bias"), [(ClipLoss, False), (SigLipLoss, True)])
def test_loss_under_autocast_is_float32(kind, bias):
    ours, inputs = kind(), _inputs(bias=bias)
    evakernels.accelerate(ours, force=True)
    with torch.autocast("cpu", torch.bfloat16):
        value, expected = ours(*inputs), kind()(*inputs)
    assert value.dtype == expected.dtype
    torch.testing.assert_close(value, expected, rtol=2e-2, atol=2e-2)


def test_loss_bias_and_float_scale_run_own_code():
    ours = ClipLoss()
    evakernels.accelerate(ours, force=True)
    image, text, scale = _inputs()
    with log_ops() as ops:
        ours(image, text, scale, logit_bias=torch.zeros(()))
        ours(image, text, 1.3)
    assert not ops


def test_loss_subclass_is_left():
    loss = CoCaLoss(1.0, 1.0)
    (left,) = (entry for entry in evakernels.accelerate(loss, force=True).left if entry.module == "CoCaLoss")
    assert left.reason.startswith("behaves differently: ")


def _compare(rank):
    for kind, modes, bias in ((ClipLoss, CLIP_MODES, False), (SigLipLoss, SIGLIP_MODES, True)):
        for mode in modes:
            theirs = kind(rank=rank, world_size=WORLD, **mode)
            try:
                _assert_same(copy.deepcopy(theirs), theirs, _inputs(rank, bias=bias))
            except AssertionError as error:
                error.add_note(f"{kind.__name__} {mode}")
                raise


@pytest.mark.exhaustive
@pytest.mark.xdist_group("processes")
def test_loss_exchanges_between_ranks(tmp_path):
    results_of_ranks(_compare, WORLD, tmp_path, "evakernels", "open_clip")
