import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import op_checks
import pytest
import torch
import torch.nn.functional as F
from on_device import DEVICE
from op_checks import DTYPES, OPCHECK_DTYPES, assert_opcheck, exhaustive_but, randn, served_by, with_gradients
from torch.utils.flop_counter import FlopCounterMode

import evakernels
from evakernels import backends
from evakernels.nn import ClipLoss, SigLipLoss
from evakernels.reference import contrastive as reference

OPS = torch.ops.evakernels
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


# Name, our function and plain PyTorch's, inputs. Seven rows make three full tiles of two and a part.
SQUARE = (randn(7, 5), randn(7, 5, seed=1), scalar(1.7))
CASES = [
    pytest.param(
        (differentiable_statistics, statistics_of_matrix),
        (randn(4, 5), randn(7, 5, seed=1), scalar(1.7)),
        id="statistics",
    ),
    pytest.param(smoothed(0.0), SQUARE, id="clip"),
    pytest.param(smoothed(0.3), SQUARE, id="clip-smoothed"),
    pytest.param(smoothed(0.0, memory_budget=0), SQUARE, id="clip-not-kept"),
    pytest.param((evakernels.siglip_loss, sigmoid_losses), (*SQUARE, scalar(-1.0)), id="siglip"),
]


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    if request.param == "many tiles":
        monkeypatch.setattr(reference, "TILE_ELEMENTS", 2 * 7)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("pair", "inputs"), CASES)
def test_gradcheck(pair, inputs):
    op_checks.assert_gradcheck(pair[0], inputs)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("pair", "inputs"), CASES)
def test_equals_the_matrix_in_float64(pair, inputs):
    ours, theirs = pair
    torch.testing.assert_close(ours(*inputs), theirs(*inputs), rtol=1e-13, atol=1e-13)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pair", "inputs"), CASES)
def test_as_accurate_as_torch(pair, inputs, dtype):
    op_checks.assert_as_accurate_as_torch(*pair, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("pair", "scalars"),
    [
        pytest.param(smoothed(0.0), [100.0], id="clip"),
        pytest.param(smoothed(0.1), [100.0], id="clip-smoothed"),
        pytest.param(smoothed(0.0, memory_budget=0), [100.0], id="clip-not-kept"),
        pytest.param((evakernels.siglip_loss, sigmoid_losses), [100.0, -20.0], id="siglip"),
    ],
)
def test_a_trained_scale_is_as_accurate_as_torch(pair, scalars, dtype):
    image, noise = (F.normalize(randn(300, 32, seed=s), dim=1) for s in (0, 1))
    text = F.normalize(image + 0.5 * noise, dim=1)
    op_checks.assert_as_accurate_as_torch(*pair, (image, text, *map(scalar, scalars)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "pair",
    [smoothed(0.1), smoothed(0.1, memory_budget=0), (evakernels.siglip_loss, sigmoid_losses)],
    ids=["clip", "clip-not-kept", "siglip"],
)
def test_odd_tiles_as_accurate_as_torch(pair, dtype):
    inputs = [F.normalize(randn(1043, 37, seed=s), dim=1) for s in (0, 1)]
    scalars = [scalar(10.0)] if pair[1] is not sigmoid_losses else [scalar(10.0), scalar(-10.0)]
    op_checks.assert_as_accurate_as_torch(*pair, [*inputs, *scalars], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_logits_as_accurate_as_torch(dtype):
    """The largest logits of rows and of columns lie 200 apart, where no common shift serves all."""
    image, text = randn(150, 3), randn(600, 3, seed=1)
    image[:, 0] = torch.where(torch.arange(150) % 2 == 0, 100, -100)
    text[:, 0] = 1

    def ours(*inputs):
        return evakernels.contrastive_statistics(*inputs, OFFSET)[:3]

    for inputs in ((image, text), (text[:148], image)):
        op_checks.assert_as_accurate_as_torch(ours, statistics_of_matrix, (*inputs, scalar(1.0)), dtype)


def products_of(logits, features):
    """Those of tiles of 512 rows, as the gradients of images and texts are made of: torch's, of which MKL may cut the
    sum into parts for the threads."""
    tiles = list(zip(logits.split(512), features.split(512), strict=True))
    return [torch.cat([tile @ features for tile, _ in tiles]), sum(tile.T @ part for tile, part in tiles)]


@pytest.mark.cpu_only("its threads")
def test_the_number_of_threads_does_not_change_a_bit():
    inputs = [F.normalize(randn(1043, 37, seed=s), dim=1).float() for s in (0, 1)]
    logits = randn(1043, 1043).float()
    results, products = [], []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        leaves = [t.clone().requires_grad_() for t in (*inputs, torch.tensor(10.0), torch.tensor(-10.0))]
        loss = evakernels.clip_loss(*leaves[:3]) + evakernels.siglip_loss(*leaves)
        image, text, *others = torch.autograd.grad(loss, leaves)
        results.append([image, text, loss, *others])
        products.append(products_of(logits, inputs[0]))
    torch.set_num_threads(before)
    changed = [not torch.equal(a, b) for a, b in zip(*products, strict=True)] + [False] * 3
    for a, b, by_torch in zip(*results, changed, strict=True):
        assert torch.equal(a, b) or by_torch


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


@pytest.mark.usefixtures("tiles")
def test_kept_logits_serve_several_backward_passes():
    image, text, scale = (t.float().requires_grad_() for t in SQUARE)
    loss = evakernels.clip_loss(image, text, scale)
    first, second = (torch.autograd.grad(loss, (image, text, scale), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_may_be_strided():
    image, text, scale = (t.float() for t in SQUARE)
    strided = image.T.contiguous().T, text.repeat(1, 2)[:, :5], scale
    expected = with_gradients(evakernels.clip_loss, (image, text, scale))
    actual = with_gradients(evakernels.clip_loss, strided, as_they_lie=True)
    # Not to the bit: a product on the reference may add up in another order for another layout.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("pair", "inputs"), exhaustive_but(CASES, "clip", "siglip"))
def test_compiles_without_graph_break(pair, inputs, dynamic):
    op_checks.assert_compiles(pair[0], inputs, dynamic)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("pair", "inputs"), CASES)
def test_two_runs_are_bit_equal(pair, inputs):
    op_checks.assert_deterministic(pair[0], [t.float() for t in inputs])


@pytest.mark.parametrize("dtype", OPCHECK_DTYPES)
def test_opcheck(dtype):
    inputs = [t.to(dtype).requires_grad_() for t in (randn(3, 4), randn(6, 4, seed=1), scalar(2.0), scalar(-1.0))]
    assert_opcheck(OPS.contrastive_forward.default, (*inputs[:3], OFFSET))
    assert_opcheck(OPS.contrastive_kept_forward.default, (*inputs[:3], OFFSET))
    assert_opcheck(OPS.siglip_forward.default, (*inputs, OFFSET, [True, False]))
    with torch.no_grad():
        inputs = [t.detach() for t in inputs]
        assert_opcheck(OPS.siglip_value.default, (*inputs, OFFSET))
        row_lse, col_lse, positive, _, _ = OPS.contrastive_forward(*inputs[:3], OFFSET)
        cotangents = (torch.ones_like(row_lse), torch.ones_like(col_lse), torch.ones_like(positive))
        saved = row_lse, col_lse
        assert_opcheck(OPS.contrastive_backward.default, (*cotangents, *inputs[:3], *saved, OFFSET, [True, False]))
        saved = *saved, OPS.contrastive_kept_forward(*inputs[:3], OFFSET)[-1]
        assert_opcheck(OPS.contrastive_kept_backward.default, (*cotangents, *inputs[:3], *saved, OFFSET, [False, True]))
        dloss, *gradients = OPS.siglip_forward(*inputs, OFFSET, [False, True])
        assert_opcheck(OPS.siglip_backward.default, (dloss, *inputs, *gradients))


LOSSES = {
    "contrastive_kept_backward": lambda image, text, scale, bias: evakernels.clip_loss(image, text, scale),
    "contrastive_backward": lambda image, text, scale, bias: evakernels.clip_loss(image, text, scale, memory_budget=0),
    "siglip_forward": evakernels.siglip_loss,
}
"""By the op that makes the gradients."""


def gradients_without(op: str, *frozen: int) -> list[torch.Tensor | None]:
    inputs = randn(6, 8), randn(6, 8, seed=1), scalar(2.0), scalar(-1.0)
    leaves = [x.float().requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
    LOSSES[op](*leaves).backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("op", LOSSES)
def test_gradients_are_contiguous(op):
    """As the op's fake says, by which compiled code reads them."""
    image, text = (randn(8, 6, seed=seed).T.requires_grad_() for seed in (0, 1))
    gradients = torch.autograd.grad(LOSSES[op](image, text, scalar(2.0), scalar(-1.0)), (image, text))
    assert all(gradient.is_contiguous() for gradient in gradients)


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("op", LOSSES)
def test_frozen_features_change_no_other_gradient(op, frozen):
    every, some = gradients_without(op), gradients_without(op, *frozen)
    for i, (expected, actual) in enumerate(zip(every, some, strict=True)):
        assert (actual is None) == (i in frozen or expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("op", LOSSES)
def test_frozen_features_cost_no_product(op):
    """A locked tower's. One product makes the logits, unless they were kept, and one each side's gradient."""

    def products(*frozen):
        counter = FlopCounterMode(display=False)

        def counted(*args):
            with counter:
                return getattr(reference, op)(*args)

        with served_by(op, {"reference": backends.Implementation("reference", counted, lambda *args: [])}):
            gradients_without(op, *frozen)
        return counter.get_total_flops() / (2 * 6 * 6 * 8)

    logits = 0 if "kept" in op else 1
    assert [products(), products(0), products(1), products(0, 1)] == [logits + n for n in (2, 1, 1, 1)]


def assert_equals_open_clip(loss, *scalars):
    inputs = [F.normalize(randn(50, 16, seed=s), dim=1).float() for s in (0, 1)] + [torch.tensor(x) for x in scalars]
    theirs = getattr(pytest.importorskip("open_clip.loss"), loss.__name__)()
    torch.testing.assert_close(loss()(*inputs), theirs(*inputs), rtol=0, atol=1e-6)


def test_clip_loss_equals_open_clip():
    assert_equals_open_clip(ClipLoss, 1 / 0.07)


def test_siglip_loss_equals_open_clip():
    assert_equals_open_clip(SigLipLoss, 10.0, -10.0)


@pytest.mark.usefixtures("tiles")
def test_maxima_give_the_accuracies_in_the_batch():
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


def test_autocast_leaves_the_loss_in_float32():
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


@pytest.mark.usefixtures("tiles")
def test_nonfinite_logits_propagate():
    image, text, scale = torch.full((7, 1), -1e20), torch.full((7, 1), 1e20), torch.tensor(1.0)
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
    assert evakernels.clip_loss(image, text, scale).isnan()
    assert evakernels.siglip_loss(image, text, scale, scale).isnan()


def test_siglip_without_gradients_has_the_same_value():
    inputs = [t.float() for t in (*SQUARE, scalar(-1.0))]
    alone = evakernels.siglip_loss(*inputs)
    trained = evakernels.siglip_loss(*[t.requires_grad_() for t in inputs])
    assert not alone.requires_grad
    torch.testing.assert_close(alone, trained.detach(), rtol=1e-6, atol=0)


def peak_memory() -> int:
    """Largest resident size of this process in bytes (getrusage's would include the parent's before exec)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))


def extra_memory(batch: int) -> int:
    """Bytes by which forward and backward of both losses raise the peak of a fresh process."""
    image, text = (F.normalize(torch.randn(batch, 64), dim=1).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    for rows in (slice(0, 64), slice(None)):  # the small batch first: what a first call allocates is not the losses'
        before = peak_memory()
        evakernels.clip_loss(image[rows], text[rows], scale, label_smoothing=0.1).backward()
        evakernels.siglip_loss(image[rows], text[rows], scale, bias).backward()
    return peak_memory() - before


@pytest.mark.cpu_only("reads the peak of its memory")
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_a_large_batch_needs_no_matrix():
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
