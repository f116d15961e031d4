"""The losses over batches of 1, 2 and 4 ranks against one process with the global batch, and their collectives."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from op_checks import Recorder, message_of
from rank_tests import results_of_ranks
from torch import nn

from evakernels import clip_loss
from evakernels.nn import ClipLoss, SigLipLoss

pytestmark = pytest.mark.xdist_group("processes")

WORLD = 4
ROWS = 4
WIDTH = 5
LOSSES = {"clip": (ClipLoss, 0.0), "clip-smoothed": (ClipLoss, 0.2), "siglip": (SigLipLoss, None)}
SIZES = (1, 2, WORLD)
FAR = {"large": 900.0, "small": -900.0, "infinite": float("inf"), "spread": torch.linspace(-900, 900, WORLD * ROWS)}
EVEN = [ROWS] * WORLD
UNEVEN = {"uneven": [3, 1, 4, 2], "empty": [0, 3, 0, 2], "one alone": [0, 0, 3, 0]}


class TwoTowers(nn.Module):
    """The smallest model with everything that a contrastive loss gives gradients to."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("image", (6, WIDTH)), ("text", (6, WIDTH)), ("scale", ()), ("bias", (1,))):
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value))

    def loss(self, name: str, images: torch.Tensor, texts: torch.Tensor, group: dist.ProcessGroup | None):
        kind, smoothing = LOSSES[name]
        features = [torch.nn.functional.normalize(x @ w, dim=1) for x, w in ((images, self.image), (texts, self.text))]
        if kind is SigLipLoss:
            return SigLipLoss(group)(*features, self.scale.exp(), self.bias)
        return ClipLoss(smoothing, group)(*features, self.scale.exp())


def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images, texts = torch.randn(2, WORLD * ROWS, 6, generator=generator, dtype=torch.float64)
    return images[:rows], texts[:rows]


def gradients(model: TwoTowers) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def data_parallel_step(name: str, group: dist.ProcessGroup, rows: list[int]) -> dict[str, torch.Tensor]:
    """Loss and gradients as data-parallel training forms them: the mean of the ranks' gradients."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    images, texts = (x.split(rows[:size])[rank] for x in batch(sum(rows[:size])))
    model = TwoTowers()
    loss = model.loss(name, images, texts, group)
    loss.backward()
    for gradient in gradients(model).values():
        dist.all_reduce(gradient, group=group)
        gradient /= size
    return {"loss": loss.detach(), **gradients(model)}


def collectives() -> dict[str, list[str]]:
    """Names of the collectives of a loss and its gradient, in order."""
    scale, bias, world = torch.tensor(5.0), torch.tensor(-2.0), dist.group.WORLD
    losses = {
        "clip": lambda *features: ClipLoss(group=world)(*features, scale),
        "clip, counts given": lambda *features: ClipLoss(group=world)(*features, scale, counts=EVEN),
        "siglip": lambda *features: SigLipLoss(group=world)(*features, scale, bias),
    }
    found = {}
    for name, loss in losses.items():
        with Recorder() as recorder:
            loss(*(torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(2))).backward()
        found[name] = [op.name().partition("::")[2] for op, _ in recorder.calls if op.namespace == "c10d"]
    return found


def far_features(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Features whose logits' exponentials no float64 holds."""
    images, texts = batch(WORLD * ROWS)
    images[:, 0], texts[:, 0] = FAR[name], 1.0
    return images, texts


def far_loss(name: str) -> tuple[torch.Tensor, ...]:
    rank = dist.get_rank()
    features = [x[rank * ROWS : (rank + 1) * ROWS].requires_grad_() for x in far_features(name)]
    loss = ClipLoss(group=dist.group.WORLD)(*features, torch.ones((), dtype=torch.float64))
    return loss.detach(), *torch.autograd.grad(loss, features)


def global_loss(images: torch.Tensor, texts: torch.Tensor, group: Any = None) -> torch.Tensor:
    return ClipLoss(group=group)(images, texts, torch.tensor(1.0, dtype=images.dtype))


def work(rank: int) -> dict[Any, Any]:
    groups = {size: dist.new_group(list(range(size))) for size in SIZES}
    results, model, (images, texts) = {}, TwoTowers(), batch(ROWS)
    for name in LOSSES:
        for kind, rows in UNEVEN.items():
            results[name, kind] = data_parallel_step(name, groups[WORLD], rows)
        nothing = (x[:0] for x in (images, texts))
        results[name, "nowhere"] = message_of(model.loss, name, *nothing, dist.group.WORLD)
        for size in SIZES:
            if rank < size:
                results[name, size] = data_parallel_step(name, groups[size], EVEN)
    if rank > 0:
        results["outside"] = message_of(model.loss, "clip", images, texts, groups[1])
    narrow = images[:, : 6 - rank], texts[:, : 6 - rank]
    results["unequal"] = message_of(global_loss, *narrow)
    partly_frozen = [x.clone().requires_grad_(rank in (1, 2)) for x in (images, texts)]
    results["partly frozen"] = message_of(global_loss, *partly_frozen)
    some = [x[: 0 if rank == 1 else 2].float() for x in (images, texts)]
    results["wide"] = [
        kind(group=dist.group.WORLD)(*some, *[torch.ones((), dtype=torch.float64)] * scalars).detach()
        for kind, scalars in ((ClipLoss, 1), (SigLipLoss, 2))
    ]
    transforms = torch.func.grad, torch.func.jacfwd
    results["transformed"] = [message_of(transform(global_loss), images, texts) for transform in transforms]
    half = [x.to(torch.bfloat16).requires_grad_() for x in (images, texts)]
    loss = ClipLoss(group=dist.group.WORLD)(*half, torch.tensor(1.0))
    loss.backward()
    results["half"] = loss.detach(), half[1].grad
    results["collectives"] = collectives()
    options = {}, {"counts": [ROWS] * WORLD}
    results["counted"] = [
        ClipLoss(group=dist.group.WORLD)(images, texts, torch.tensor(1.0).double(), **given) for given in options
    ]
    results["miscounted"] = [
        message_of(
            lambda wrong=wrong: clip_loss(images, texts, torch.tensor(1.0), group=dist.group.WORLD, counts=wrong)
        )
        for wrong in ([4, 4], [1] * WORLD)
    ]
    for name in FAR:
        results["far", name] = far_loss(name)
    for group in (None, False):
        results["meant by", group] = [model.loss(name, images, texts, group).detach() for name in LOSSES]
    results["transformed alone"] = torch.func.grad(partial(global_loss, group=False))(images, texts)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of four gloo ranks."""
    return results_of_ranks(work, WORLD, tmp_path_factory.mktemp("ranks"), "evakernels.nn")


@pytest.mark.parametrize("size", [*SIZES, *UNEVEN])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_match_global_batch(ranks, name, size):
    rows = UNEVEN[size] if size in UNEVEN else EVEN[:size]
    model = TwoTowers()
    loss = model.loss(name, *batch(sum(rows)), None)
    loss.backward()
    expected = {"loss": loss.detach(), **gradients(model)}
    assert expected.keys() >= {"loss", "image", "text", "scale"}
    for rank in range(len(rows)):
        torch.testing.assert_close(ranks[rank][name, size], expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(ranks[rank][name, size]["loss"], ranks[0][name, size]["loss"])


def test_group_none_is_global_and_false_is_local(ranks):
    """None as in torch.distributed."""
    same = batch(ROWS)  # on every rank
    whole_batch = [TwoTowers().loss(name, *(x.repeat(WORLD, 1) for x in same), None).detach() for name in LOSSES]
    of_one = [TwoTowers().loss(name, *same, False).detach() for name in LOSSES]
    for rank in ranks:
        torch.testing.assert_close(rank["meant by", None], whole_batch, rtol=1e-12, atol=1e-12)
        assert rank["meant by", False] == of_one
        torch.testing.assert_close(rank["transformed alone"], torch.func.grad(global_loss)(*same))


def test_16_bit_features_are_gathered_in_16_bits(ranks):
    images, texts = (x.to(torch.bfloat16).repeat(WORLD, 1).requires_grad_() for x in batch(ROWS))
    loss = ClipLoss()(images, texts, torch.tensor(1.0))
    loss.backward()
    for rank in range(WORLD):
        value, gradient = ranks[rank]["half"]
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(value, loss.detach(), rtol=1e-6, atol=1e-6)
        own = texts.grad[rank * ROWS : (rank + 1) * ROWS]
        torch.testing.assert_close(gradient, WORLD * own, rtol=2e-2, atol=2e-3)


def test_ranks_exchange_text_features_only(ranks):
    """They are gathered and their gradient is scattered; all-reduces carry a maximum and a sum per column.

    Without given counts of rows these are gathered first, and the host waits for them.
    """
    gather, reduce = "_allgather_base_", "allreduce_"
    clip = [gather, reduce, reduce, "_reduce_scatter_base_"]
    siglip = [gather, gather, reduce, "_reduce_scatter_base_"]
    for rank in ranks:
        assert rank["collectives"] == {"clip": [gather, *clip], "clip, counts given": clip, "siglip": siglip}


def test_given_counts_are_checked_and_bit_equal(ranks):
    for rank in ranks:
        agreed, given = rank["counted"]
        torch.testing.assert_close(given, agreed, rtol=0, atol=0)
        assert all("counts" in message for message in rank["miscounted"])


@pytest.mark.parametrize("name", FAR)
def test_large_sums_are_relative_to_the_largest(ranks, name):
    features = [x.requires_grad_() for x in far_features(name)]
    loss = ClipLoss()(*features, torch.ones((), dtype=torch.float64))
    gradients = torch.autograd.grad(loss, features)
    for rank in range(WORLD):
        value, *own = ranks[rank]["far", name]
        torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=0, equal_nan=True)
        for gradient, whole in zip(own, gradients, strict=True):
            expected = WORLD * whole[rank * ROWS : (rank + 1) * ROWS]
            torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("unequal", "text_features must have the same width"),
        *(((name, "nowhere"), "text_features must have rows") for name in LOSSES),
        # The backward pass of the other ranks would wait.
        ("partly frozen", "text_features must require a gradient"),
    ],
)
def test_wrong_features_are_named_on_every_rank(ranks, key, message):
    assert all(message in rank[key] for rank in ranks)


def test_empty_batch_loss_has_the_features_dtype(ranks):
    for rank in ranks:
        assert [loss.dtype for loss in rank["wide"]] == [torch.float32] * 2
        assert rank["wide"] == ranks[0]["wide"]


def test_transforms_are_refused_before_any_collective(ranks):
    for rank in ranks:
        assert all("clip_loss: group must be False" in message for message in rank["transformed"])


def test_rank_outside_the_group_is_an_error(ranks):
    assert all("group must contain this rank" in rank["outside"] for rank in ranks[1:])
