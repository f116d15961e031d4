"""The losses over the batches of 2 and 3 processes against one process with the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from evakernels.nn import ClipLoss, SigLipLoss

pytestmark = pytest.mark.xdist_group("processes")

WORLD = 3
ROWS = 4
LOSSES = {"clip": (ClipLoss, 0.0), "clip-smoothed": (ClipLoss, 0.2), "siglip": (SigLipLoss, None)}
SIZES = (2, 3)


class TwoTowers(nn.Module):
    """The smallest model with everything that a contrastive loss gives gradients to."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("image", (6, 5)), ("text", (6, 5)), ("scale", ()), ("bias", (1,))):
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


def data_parallel_step(name: str, group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    """Loss and gradients as data-parallel training forms them: the mean of the ranks' gradients."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    images, texts = (x[rank * ROWS : (rank + 1) * ROWS] for x in batch(size * ROWS))
    model = TwoTowers()
    loss = model.loss(name, images, texts, group)
    loss.backward()
    for gradient in gradients(model).values():
        dist.all_reduce(gradient, group=group)
        gradient /= size
    return {"loss": loss.detach(), **gradients(model)}


def message_of(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    groups = {size: dist.new_group(list(range(size))) for size in (1, *SIZES)}
    results = {}
    for size in SIZES:
        for name in LOSSES:
            if rank < size:
                results[name, size] = data_parallel_step(name, groups[size])
    model, (images, texts) = TwoTowers(), batch(ROWS)
    if rank == 0:
        results["alone"] = model.loss("clip", images, texts, groups[1]).detach()
    else:
        results["outside"] = message_of(lambda: model.loss("clip", images, texts, groups[1]))
    results["unequal"] = message_of(
        lambda: model.loss("clip", images[: ROWS - rank], texts[: ROWS - rank], dist.group.WORLD)
    )
    half = [x.to(torch.bfloat16).requires_grad_() for x in (images, texts)]
    loss = ClipLoss(group=dist.group.WORLD)(*half, torch.tensor(1.0))
    loss.backward()
    results["half"] = loss.detach(), half[1].grad
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of three gloo processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_mean_of_gradients_are_those_of_the_whole_batch(ranks, name, size):
    model = TwoTowers()
    loss = model.loss(name, *batch(size * ROWS), None)
    loss.backward()
    expected = {"loss": loss.detach(), **gradients(model)}
    assert expected.keys() >= {"loss", "image", "text", "scale"}
    for rank in range(size):
        torch.testing.assert_close(ranks[rank][name, size], expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(ranks[rank][name, size]["loss"], ranks[0][name, size]["loss"])


def test_a_group_of_one_is_no_group(ranks):
    assert torch.equal(ranks[0]["alone"], TwoTowers().loss("clip", *batch(ROWS), None).detach())


def test_half_precision_features_are_gathered_as_they_are(ranks):
    images, texts = (x.to(torch.bfloat16).repeat(WORLD, 1).requires_grad_() for x in batch(ROWS))
    loss = ClipLoss()(images, texts, torch.tensor(1.0))
    loss.backward()
    for rank in range(WORLD):
        value, gradient = ranks[rank]["half"]
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(value, loss.detach(), rtol=1e-6, atol=1e-6)
        own = texts.grad[rank * ROWS : (rank + 1) * ROWS]
        torch.testing.assert_close(gradient, WORLD * own, rtol=2e-2, atol=2e-3)


def test_unequal_batches_are_named_on_every_rank(ranks):
    for rank in range(WORLD):
        assert "text_features has shape [4, 5] on rank 0, [3, 5] on rank 1, [2, 5] on rank 2" in ranks[rank]["unequal"]


def test_a_process_outside_the_group_is_told_so(ranks):
    for rank in range(1, WORLD):
        assert "not a member of group" in ranks[rank]["outside"]
