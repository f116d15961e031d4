import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import op_checks
import pytest
import torch
import torch.nn.functional as F
from case_tests import *  # noqa: F403
from on_device import DEVICE
from op_checks import DTYPES, no_triton, randn, served_by
from torch.utils.flop_counter import FlopCounterMode

import evakernels
from evakernels import _logit_gradients, _logit_tiles, backends
from evakernels.nn import ClipLoss, SigLipLoss
from evakernels.reference import contrastive as reference

OFFSET = 2


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def logits_of(image, text, logit_scale):
    return logit_scale * image @ text.T


def cross_entropies(image, text, logit_scale, label_smoothing=0.0):
    logits, labels = logits_of(image, text, logit_scale), torch.arange(image.shape[0])
    both = [F.cross_entropy(s, labels, label_smoothing=label_smoothing) for s in (logits, logits.T)]
    return (both[0] + both[1]) / 2


def sigmoid_losses(image, text, logit_scale, logit_bias):
    logits = logits_of(image, text, logit_scale) + logit_bias
    labels = 2 * torch.eye(image.shape[0], dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / image.shape[0]


def statistics_of_matrix(image, text, logit_scale):
    logits = logits_of(image, text, logit_scale)
    return logits.logsumexp(1), logits.logsumexp(0), logits.diagonal(OFFSET)


def differentiable_statistics(image, text, logit_scale):
    return evakernels.contrastive_statistics(image, text, logit_scale, OFFSET)[:3]


def smoothed(label_smoothing, **options):
    return (
        lambda *inputs: evakernels.clip_loss(*inputs, label_smoothing=label_smoothing, **options),
        lambda *inputs: cross_entropies(*inputs, label_smoothing),
    )


# Seven rows make three full tiles of two and a part.
SQUARE = (randn(7, 5), randn(7, 5, seed=1), scalar(1.7))
CASES = [
    pytest.param(
        (differentiable_statistics, statistics_of_matrix),
        (randn(4, 8), randn(7, 8, seed=1), scalar(1.7)),
        id="statistics",
    ),
    pytest.param(smoothed(0.0), SQUARE, id="clip"),
    pytest.param(smoothed(0.3), SQUARE, id="clip-smoothed"),
    pytest.param(smoothed(0.0, memory_budget=0), SQUARE, id="clip-not-kept"),
    pytest.param((evakernels.siglip_loss, sigmoid_losses), (*SQUARE, scalar(-1.0)), id="siglip"),
]


def both_losses(scale, bias):
    """Of fixed features: torch's matmuls may sum their gradients in another order for another number of threads."""
    features = [F.normalize(randn(1043, 37, seed=s), dim=1).float() for s in (0, 1)]
    return evakernels.clip_loss(*features, scale) + evakernels.siglip_loss(*features, scale, bias)


THREADED = [(both_losses, [torch.tensor(10.0), torch.tensor(-10.0)])]
TRANSFORMED = [case.id for case in CASES]
CASES += [pytest.param(*case.values, id=f"{case.id}-many-tiles", marks=no_triton) for case in CASES]
QUICK = {"test_compiles_without_graph_break": ["clip", "siglip"]}


@pytest.fixture(autouse=True)
def tiles(request, monkeypatch):
    if "many-tiles" in request.node.name:
        monkeypatch.setattr(reference, "TILE_ELEMENTS", 2 * 7)
        monkeypatch.setattr(_logit_tiles, "TILE", (2 * 7, 512))


TRAINED = 100.0, -20.0
"""Scale and bias of a trained model."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "scalars"), [(300, 40, TRAINED), (1043, 37, (10.0, -10.0))])
@pytest.mark.parametrize(
    "pair",
    [smoothed(0.1), smoothed(0.1, memory_budget=0), (evakernels.siglip_loss, sigmoid_losses)],
    ids=["clip", "clip-not-kept", "siglip"],
)
@pytest.mark.kernels
def test_odd_tiles_and_trained_scale_are_accurate(pair, rows, width, scalars, dtype):
    image, noise = (F.normalize(randn(rows, width, seed=s), dim=1) for s in (0, 1))
    text = F.normalize(image + 0.5 * noise, dim=1) if scalars == TRAINED else noise
    scalars = scalars if pair[1] is sigmoid_losses else scalars[:1]
    op_checks.assert_as_accurate_as_torch(*pair, [image, text, *map(scalar, scalars)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.kernels
def test_small_logits_as_accurate_as_torch(dtype):
    """The largest logits of rows and of columns lie 200 apart, where no common shift serves all."""
    image, text = randn(150, 3), randn(600, 3, seed=1)
    image[:, 0] = torch.where(torch.arange(150) % 2 == 0, 100, -100)
    text[:, 0] = 1

    def ours(*inputs):
        return evakernels.contrastive_statistics(*inputs, OFFSET)[:3]

    for inputs in ((image, text), (text[:148], image)):
        op_checks.assert_as_accurate_as_torch(ours, statistics_of_matrix, (*inputs, scalar(1.0)), dtype)


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.bfloat16, 4), (torch.float32, 4), (torch.float64, 8)])
def test_logits_are_saved_within_the_budget(dtype, itemsize):
    def largest_saved(budget, **needs):
        image, text, scale = (t.to(dtype).requires_grad_(**needs) for t in SQUARE)
        sizes = [0]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            ClipLoss(memory_budget=budget)(image, text, scale)
        return max(sizes)

    assert largest_saved(7 * 7 * itemsize) == 7 * 7
    assert largest_saved(7 * 7 * itemsize - 1) == 7 * 5
    assert largest_saved(7 * 7 * itemsize, requires_grad=False) == 0


def test_kept_logits_allow_a_second_backward():
    image, text, scale = (t.float().requires_grad_() for t in SQUARE)
    loss = evakernels.clip_loss(image, text, scale)
    first, second = (torch.autograd.grad(loss, (image, text, scale), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", [{}, {"memory_budget": 0}], ids=["kept", "not-kept"])
def test_scale_of_zero_has_gradient(options):
    """Logits of 0 don't show the products of the features."""
    image, text, _ = SQUARE
    exact, scale = scalar(0.0).requires_grad_(), torch.zeros((), requires_grad=True)
    (expected,) = torch.autograd.grad(cross_entropies(image, text, exact), exact)
    (actual,) = torch.autograd.grad(evakernels.clip_loss(image.float(), text.float(), scale, **options), scale)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


LOSSES = {
    "clip": lambda image, text, scale, bias: evakernels.clip_loss(image, text, scale),
    "clip-not-kept": lambda image, text, scale, bias: evakernels.clip_loss(image, text, scale, memory_budget=0),
    "siglip": evakernels.siglip_loss,
}


def gradients_without(loss: str, *frozen: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor | None]:
    features, scalars = (randn(6, 8), randn(6, 8, seed=1)), (scalar(2.0), scalar(-1.0))
    inputs = [x.to(dtype) for x in features] + [x.float() for x in scalars]
    leaves = [x.requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
    LOSSES[loss](*leaves).backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.kernels("nvcc", "triton")
def test_frozen_features_change_no_other_gradient(loss, frozen, dtype):
    every, some = gradients_without(loss, dtype=dtype), gradients_without(loss, *frozen, dtype=dtype)
    for i, (expected, actual) in enumerate(zip(every, some, strict=True)):
        assert (actual is None) == (i in frozen or expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-6)


def dlogits_of_chunk(drow_lse, dcol_lse, dpositive, image, text, logit_scale, row_lse, col_lse, offset):
    logits = logits_of(image, text, logit_scale)
    dlogits = drow_lse[:, None] * (logits - row_lse[:, None]).exp() + dcol_lse * (logits - col_lse).exp()
    dlogits.diagonal(offset).add_(dpositive)
    return dlogits


@pytest.mark.parametrize("needs_grad", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_gradients_of_chunks_equal_reference(monkeypatch, needs_grad):
    """Five images in chunks of two, with features padded from 5 to 8 channels."""
    monkeypatch.setattr(_logit_gradients, "CHUNK", (1, 2))
    image, text, scale = randn(5, 5).float(), randn(9, 5, seed=1).float(), torch.tensor(1.7)
    row_lse, col_lse, *_ = reference.contrastive_forward(image, text, scale, OFFSET, False)
    upstream = (randn(n, seed=2).float() for n in (5, 9, 5))
    arguments = *upstream, image, text, scale, row_lse, col_lse, None, OFFSET, needs_grad
    actual = _logit_gradients.contrastive_backward(dlogits_of_chunk, *arguments, multiple=4)
    torch.testing.assert_close(actual, reference.contrastive_backward(*arguments), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_frozen_features_cost_no_matmul(loss):
    """One matmul computes the logits, unless they were saved, and one the gradient of each side."""
    op = "siglip_forward" if loss == "siglip" else "contrastive_backward"

    def matmuls(*frozen):
        counter = FlopCounterMode(display=False)

        def counted(*args):
            with counter:
                return getattr(reference, op)(*args)

        with served_by(op, {"reference": backends.Implementation("reference", counted, lambda *args: [])}):
            gradients_without(loss, *frozen)
        return counter.get_total_flops() / (2 * 6 * 6 * 8)

    logits = 0 if loss == "clip" else 1
    assert [matmuls(), matmuls(0), matmuls(1), matmuls(0, 1)] == [logits + n for n in (2, 1, 1, 1)]


@pytest.mark.parametrize("many", [False, True], ids=["one-tile", "many-tiles"])
def test_maxima_give_in_batch_accuracy(many):
    image, text, scale = (t.float() for t in SQUARE)
    image = text + 0.8 * image
    _, _, positive, row_max, col_max = evakernels.contrastive_statistics(image, text, scale)
    logits, labels = logits_of(image, text, scale), torch.arange(7)
    assert torch.equal(positive >= row_max, logits.argmax(1) == labels)
    assert torch.equal(positive >= col_max, logits.argmax(0) == labels)
    assert 0 < (positive >= row_max).sum() < 7


def test_scale_gradient_has_the_scales_shape():
    scale, bias = torch.tensor([5.0], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    image, text, _ = (t.float() for t in SQUARE)
    loss = ClipLoss()(image, text, scale) + SigLipLoss()(image, text, scale, bias)
    loss.backward()
    assert loss.shape == ()
    assert scale.grad.shape == bias.grad.shape == (1,)


def test_loss_under_autocast_is_float32():
    inputs = [t.float() for t in (*SQUARE, scalar(-1.0))]
    for function, arguments in ((evakernels.clip_loss, inputs[:3]), (evakernels.siglip_loss, inputs)):
        leaves, plain = ([t.clone().requires_grad_() for t in arguments] for _ in range(2))
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss = function(*leaves)
            loss.backward()
        expected = function(*plain)
        expected.backward()
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, plain, strict=True))


@pytest.mark.parametrize("many", [False, True], ids=["one-tile", "many-tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.kernels("nvcc")
def test_nonfinite_logits_propagate(many, dtype):
    image, text = (torch.full((7, 1), value, dtype=dtype) for value in (-1e20, 1e20))
    scale = torch.tensor(1.0)
    row_lse, col_lse, *_ = evakernels.contrastive_statistics(image, text, scale)
    assert row_lse.isneginf().all()
    assert col_lse.isneginf().all()
    image[1] = 1e20
    row_lse, col_lse, _, row_max, _ = evakernels.contrastive_statistics(image, text, scale)
    assert torch.equal(row_lse.isposinf(), torch.arange(7) == 1)
    assert row_max[1] == torch.inf
    assert col_lse.isposinf().all()
    image[1, 0] = torch.nan
    row_lse, col_lse, _, row_max, col_max = evakernels.contrastive_statistics(image, text, scale)
    assert torch.equal(row_lse.isnan(), torch.arange(7) == 1)
    assert torch.equal(row_max.isnan(), torch.arange(7) == 1)
    assert col_lse.isnan().all()
    assert col_max.isnan().all()
    text.requires_grad_()
    inputs = image, text, scale
    for loss in (evakernels.clip_loss(*inputs, memory_budget=0), evakernels.siglip_loss(*inputs, scale)):
        assert loss.isnan()
        assert torch.autograd.grad(loss, text)[0].isnan().all()


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
@pytest.mark.kernels("nvcc")
def test_scaled_loss_gradient_float16_is_finite(factor):
    """Unscaled gradients of logits would overflow or vanish in float16."""
    image, text, scale = (t.half() for t in SQUARE)
    scale = scale.float().requires_grad_()
    loss = evakernels.clip_loss(image, text, scale, memory_budget=0)
    expected, actual = (torch.autograd.grad(f * loss, scale, retain_graph=True)[0] for f in (1.0, factor))
    torch.testing.assert_close(actual, factor * expected, rtol=1e-6, atol=0)


def peak_memory() -> int:
    """Largest resident size of this process in bytes (getrusage's would include the parent's before exec)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))


def extra_memory(batch: int) -> int:
    """Bytes by which forward and backward of both losses raise the peak of a fresh process."""
    image, text = (F.normalize(torch.randn(batch, 64), dim=1).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    for rows in (slice(0, 64), slice(None)):  # the small batch first: a first call allocates more
        before = peak_memory()
        evakernels.clip_loss(image[rows], text[rows], scale, label_smoothing=0.1).backward()
        evakernels.siglip_loss(image[rows], text[rows], scale, bias).backward()
    return peak_memory() - before


@pytest.mark.cpu_only("reads the peak of its memory")
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_large_batch_needs_no_matrix():
    batch = 9216  # more than MEMORY_BUDGET: the matrix would have 324 MiB
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        extra = pool.submit(extra_memory, batch).result()
    assert 4 * reference.TILE_ELEMENTS < extra < 100 * 2**20


# --- wrong input, for test_wrong_input ------------------------------------------------------------------------------

FEATURES, SCALE = torch.ones(3, 4), torch.ones(())
BOTH = {"image_features": FEATURES, "text_features": FEATURES, "logit_scale": SCALE}
CALLS = {"clip_loss": BOTH, "siglip_loss": BOTH | {"logit_bias": SCALE}}
CALLS["contrastive_statistics"] = {"image": FEATURES, "text": FEATURES, "logit_scale": SCALE}
WRONG = {
    "clip_loss": [
        (TypeError, "text_features", {"text_features": FEATURES.half()}),
        (ValueError, "text_features", {"text_features": torch.ones(4, 4)}),
        (ValueError, "image_features", dict.fromkeys(("image_features", "text_features"), FEATURES[:0])),
        (ValueError, "label_smoothing", {"label_smoothing": 2}),
        (TypeError, "label_smoothing", {"label_smoothing": "0.1"}),
        (ValueError, "memory_budget", {"memory_budget": -1}),
        (TypeError, "memory_budget", {"memory_budget": None}),
        (ValueError, "init_process_group", {"group": object()}),
    ],
    "contrastive_statistics": [
        (ValueError, "text", {"text": torch.ones(5, 3)}),
        (ValueError, "text", {"text": FEATURES[:2]}),
        (ValueError, "offset", {"offset": 1}),
        (TypeError, "offset", {"offset": "0"}),
        (TypeError, "offset", {"offset": 1.0}),
    ],
}
