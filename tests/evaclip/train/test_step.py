"""One optimizer step: exact accumulation, guarded updates, precision."""

import copy
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from contrastive_step import contrastive_step, random_batch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evaclip.data.loader import Rows
from evaclip.model.clip import CLIP
from evaclip.model.config import Savings
from evaclip.train import rng
from evaclip.train.config import LossConfig, OptimConfig
from evaclip.train.fake_ranks import fake_ranks
from evaclip.train.loss import ContrastiveLoss
from evaclip.train.micro_batch import Upload
from evaclip.train.step import StepOptions, TrainStep
from evaclip.train.token_sampling import token_index
from evaclip.transforms import Normalization

BATCH = 8


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return random_batch()


def make_step(model, options=None, loss=None, device="cpu", world=None, **optim):
    return contrastive_step(model, OptimConfig(**{"lr": 1e-2, **optim}), options, loss, device, world)


def gradients(step: TrainStep) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in step.task.model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("recompute", ["none", "activations", "block"])
def test_accumulation_equals_the_whole_batch(small_model, batch, loss, recompute):
    small_model.logit_bias = nn.Parameter(torch.tensor(-10.0))
    small_model.double().visual.patch_dropout = 0.5
    small_model.set_savings(Savings(recompute=recompute))
    found = []
    for accumulation in (1, 3):  # of 8 samples
        step = make_step(copy.deepcopy(small_model), StepOptions(accumulation=accumulation), LossConfig(name=loss))
        result = step(batch[0].double(), batch[1], step=3)
        found.append((result, gradients(step)))
    (whole, whole_gradients), (chunked, chunked_gradients) = found
    assert whole_gradients.keys() == chunked_gradients.keys()
    assert whole_gradients["logit_scale"].abs() > 1e-4
    assert ("logit_bias" in whole_gradients) == (loss == "siglip")
    torch.testing.assert_close(chunked.loss, whole.loss, rtol=1e-12, atol=0)
    for name, expected in whole_gradients.items():
        torch.testing.assert_close(chunked_gradients[name], expected, rtol=1e-7, atol=1e-12, msg=name)


def test_the_device_gets_one_chunk_at_a_time(small_model, batch, monkeypatch):
    sent: list[int] = []
    original = Tensor.to

    def spy(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.shape[1:] == batch[0].shape[1:]:
            sent.append(len(self))
        return original(self, *args, **kwargs)

    step = make_step(small_model, StepOptions(accumulation=4))
    monkeypatch.setattr(Tensor, "to", spy)
    step(*batch, step=0)
    assert set(sent) == {BATCH // 4}


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(small_model, batch, optimizer, where):
    step = make_step(small_model, StepOptions(grad_clip_norm=1.0), name=optimizer)
    images, tokens = batch
    step(images, tokens, step=0)
    before = copy.deepcopy(small_model.state_dict())
    moments = copy.deepcopy(step.optimizer.state_dict()["state"])
    if where == "loss":
        bad = images.clone()
        bad[0, 0, 0, 0] = math.nan
        result = step(bad, tokens, step=1)
    else:
        handle = small_model.text.ln_final.weight.register_hook(lambda gradient: gradient * math.inf)
        result = step(images, tokens, step=1)
        handle.remove()
    assert result.found_inf == 1
    for name, value in small_model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for index, state in step.optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, moments[index][key]), key
    step(images, tokens, step=2)
    assert (int(step.skipped), int(step.skipped_in_a_row)) == (1, 0)
    assert not torch.equal(small_model.visual.head.weight, before["visual.head.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulation", [1, 8])
def test_16_bit_gradients_are_summed_in_float32(small_model, batch, dtype, accumulation):
    """The sum is that of the micro-batches' gradients in float64. One micro-batch keeps its 16-bit gradient."""
    small_model.to(dtype)
    sums: dict[str, Tensor] = {}
    step = make_step(small_model, StepOptions(accumulation=accumulation, grad_clip_norm=1.0), name="lamb")
    for name, parameter in small_model.named_parameters():
        parameter.register_hook(lambda part, name=name: sums.update({name: sums.get(name, 0.0) + part.double()}))
    for number in range(2):
        sums.clear()
        result = step(*batch, number)
        found = gradients(step)
        assert found.keys() == sums.keys()
        for name, gradient in found.items():
            assert gradient.dtype == (dtype if accumulation == 1 else torch.float32), name
            torch.testing.assert_close(gradient.double(), sums[name], rtol=1e-6, atol=1e-6 * sums[name].abs().max())
        norm = torch.cat([value.flatten() for value in sums.values()]).norm()
        torch.testing.assert_close(result.grad_norm.double(), norm, rtol=1e-6, atol=0)
    assert result.found_inf == 0


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "amp_fp16", "bf16", "fp16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_precision_trains(small_model, batch, precision, accumulation):
    if not precision.startswith("amp"):
        small_model.to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision])
    options = StepOptions(precision=precision, accumulation=accumulation, grad_clip_norm=1.0)
    step = make_step(small_model, options)
    step.loss_scale.scale.clamp_(max=1024.0)
    losses = [step(*batch, number).loss for number in range(8)]
    assert losses[0].dtype == torch.float32
    assert int(step.skipped) == 0
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_loss_of_one_rank_gathers_nothing(name: Any) -> None:
    assert ContrastiveLoss(LossConfig(name=name)).loss.group is False


def test_amp_computes_the_loss_in_float32(small_model: CLIP, batch: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        image_features, text_features, _ = small_model(*batch)
    expected = ContrastiveLoss(LossConfig())(
        image_features.float(), text_features.float(), small_model.logit_scale.exp()
    )
    found = {
        precision: make_step(copy.deepcopy(small_model), StepOptions(precision=precision))(*batch, 0).loss
        for precision in ("fp32", "amp_bf16")
    }
    assert torch.equal(found["amp_bf16"], expected.detach())
    assert not torch.equal(found["amp_bf16"], found["fp32"])


def test_accumulation_equals_the_whole_batch_under_amp(small_model: CLIP, batch: tuple[Tensor, Tensor]) -> None:
    small_model.visual.patch_dropout = 0.5
    found = []
    for accumulation in (1, 4):
        step = make_step(copy.deepcopy(small_model), StepOptions(precision="amp_bf16", accumulation=accumulation))
        step(*batch, step=3)
        found.append(gradients(step))
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert (found[1][name] - expected).norm() <= 0.03 * expected.norm() + 1e-6, name


def test_loss_scale_does_not_change_the_gradients(small_model: CLIP, batch: tuple[Tensor, Tensor]) -> None:
    plain = make_step(copy.deepcopy(small_model), StepOptions(precision="amp_fp16"))
    plain.loss_scale.scale.fill_(1.0)
    scaled = make_step(copy.deepcopy(small_model), StepOptions(precision="amp_fp16"))
    scaled.loss_scale.scale.fill_(512.0)
    results = [step(*batch, 0) for step in (plain, scaled)]
    assert results[1].found_inf == 0
    torch.testing.assert_close(results[1].grad_norm, results[0].grad_norm, rtol=1e-2, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("precision", ["fp32", "amp_fp16"])
def test_clipping_bounds_the_norm(small_model, batch, precision, optimizer):
    """Of what reaches the moments: the gradients themselves stay as they are, times the loss scale."""
    step = make_step(small_model, StepOptions(precision=precision, grad_clip_norm=0.01), name=optimizer)
    step.loss_scale.scale.clamp_(max=1024.0)
    scale = step.loss_scale.scale.clone()
    result = step(*batch, 0)
    norm = torch.stack([gradient.norm() for gradient in gradients(step).values()]).norm() / scale
    averages = [state["exp_avg"].norm() for state in step.optimizer.state.values()]
    assert result.grad_norm > 0.1
    torch.testing.assert_close(result.grad_norm, norm, rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.stack(averages).norm() / (1 - 0.9), torch.tensor(0.01), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("start", "bound"), [(100.0, math.log(100)), (-1.0, 0.0)])
def test_logit_scale_is_clamped(small_model: CLIP, batch: tuple[Tensor, Tensor], start: float, bound: float) -> None:
    torch.nn.init.constant_(small_model.logit_scale, start)
    make_step(small_model, lr=1e-6)(*batch, 0)
    assert small_model.logit_scale.item() == pytest.approx(bound)


def test_token_dropout_does_not_depend_on_ranks() -> None:
    cpu = torch.device("cpu")
    whole = token_index((7, 3), range(600), 16, 8, cpu)
    parts = [token_index((7, 3), range(start, start + 200), 16, 8, cpu) for start in (0, 200, 400)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.shape == (600, 8)
    assert not torch.equal(whole[:256], whole[256:512])
    assert not torch.equal(token_index((7, 4), range(600), 16, 8, cpu), whole)
    assert not torch.equal(token_index((8, 3), range(600), 16, 8, cpu), whole)


def test_norms_of_the_towers(small_model: CLIP, batch: tuple[Tensor, Tensor]) -> None:
    step = make_step(small_model)
    result = step(*batch, 0)
    for name, norm in result.tower_norms.items():
        parts = [p.grad.norm() for p in getattr(small_model, name).parameters() if p.grad is not None]
        torch.testing.assert_close(norm, torch.stack(parts).norm(), rtol=1e-5, atol=0)
    scale = small_model.logit_scale.grad
    whole = torch.stack([*result.tower_norms.values(), scale.abs()]).norm()
    torch.testing.assert_close(result.grad_norm, whole, rtol=1e-5, atol=0)


def test_a_frozen_tower_has_no_norm(small_model: CLIP, batch: tuple[Tensor, Tensor]) -> None:
    small_model.text.requires_grad_(False)
    result = make_step(small_model)(*batch, 0)
    assert result.tower_norms["text"] == 0
    assert result.tower_norms["visual"] > 0


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_how_far_the_towers_moved(small_model: CLIP, batch: tuple[Tensor, Tensor], optimizer: Any) -> None:
    plain = make_step(copy.deepcopy(small_model), name=optimizer)
    step = make_step(small_model, name=optimizer)
    before = copy.deepcopy(small_model)
    unmeasured = plain(*batch, 0)
    assert (unmeasured.updates, unmeasured.measures) == (None, None)
    result = step(*batch, 0, measure=True)
    for name, found in result.updates.items():
        old = [p.detach().double() for p in getattr(before, name).parameters()]
        new = [p.detach().double() for p in getattr(small_model, name).parameters()]
        change = torch.stack([(n - o).norm() for n, o in zip(new, old, strict=True)]).norm()
        weights = torch.stack([o.norm() for o in old]).norm()
        torch.testing.assert_close(found.double(), torch.stack([change, change / weights]), rtol=1e-4, atol=0)
    for (name, value), other in zip(small_model.named_parameters(), plain.task.model.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_what_is_frozen_or_skipped_does_not_move(small_model: CLIP, batch: tuple[Tensor, Tensor]) -> None:
    small_model.text.requires_grad_(False)
    step = make_step(small_model)
    frozen = step(*batch, 0, measure=True).updates
    skipped = step(batch[0] * math.nan, batch[1], 1, measure=True).updates
    assert frozen["visual"].min() > 0
    assert torch.equal(frozen["text"], torch.zeros(2))
    assert torch.equal(skipped["visual"], torch.zeros(2))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_accuracy_is_that_of_the_whole_batch(small_model, batch, accumulation):
    small_model.eval()
    with torch.no_grad():
        image, text, _ = small_model(*batch)
        nearest = int((image[0] @ text.T).argmax())
        batch[1][[0, nearest]] = batch[1][[nearest, 0]]  # so that one at least is right
        image, text, _ = small_model(*batch)
    right = sum(int((own @ text.T).argmax() == row) for row, own in enumerate(image))
    assert 0 < right < BATCH
    step = make_step(small_model, StepOptions(accumulation=accumulation))
    measures = step(*batch, 0, measure=True).measures
    assert measures["accuracy"] == right / BATCH
    torch.testing.assert_close(measures["logit_scale"].float(), small_model.logit_scale.detach().exp())


@pytest.mark.parametrize("tile", [1, 12, 1 << 24])
def test_accuracy_of_features_that_are_alike_is_chance(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr("evaclip.train.loss._TILE", tile)
    loss = ContrastiveLoss(LossConfig())
    alike, apart = torch.ones(4, 4), torch.eye(4)
    assert loss.accuracy(alike, alike) == 0.25
    assert loss.accuracy(apart, apart) == 1
    assert loss.accuracy(apart, apart[[0, 2, 1, 3]]) == 0.5


class _Waits(TorchDispatchMode):
    """What makes the host wait for a device, here "meta": a copy to the host, or a size that only the data tells.

    Indices by masks and other ops of such a size fail on this device by themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(isinstance(value, Tensor) and value.is_meta for value in tree_leaves((args, kwargs))):
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.found.append(str(func))
            return 1
        if func is torch.ops.aten.nonzero.default:
            self.found.append(str(func))
            return torch.zeros(1, args[0].ndim, dtype=torch.int64, device="meta")
        result = func(*args, **(kwargs or {}))
        if any(isinstance(value, Tensor) and not value.is_meta for value in tree_leaves(result)):
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("processes", [1, 4])
def test_a_step_never_waits_for_the_device(
    small_model, batch, monkeypatch, accumulation, optimizer, measure, processes
):
    """Pictures and tokens are the host's, all else lies on a device that has no values to tell; of four processes, that
    average gradients, the other three aren't there. What is cut up is looked at in `test_as_gpus.py`."""
    layouts = []
    original = type(small_model.text).forward

    def spy(self: Any, tokens: Tensor, layout: Any = None) -> Tensor:
        layouts.append(layout)
        return original(self, tokens, layout)

    monkeypatch.setattr(type(small_model.text), "forward", spy)
    monkeypatch.setattr(rng, "capture", lambda device: {})
    monkeypatch.setattr(rng, "restore", lambda state, device: None)
    options = StepOptions(accumulation=accumulation, grad_clip_norm=1.0, batch_size=processes * BATCH)
    with closing(fake_ranks("cpu", processes)) as made:
        world = replace(made, device=torch.device("meta"))
        step = make_step(small_model.to("meta"), options, device="meta", world=world, name=optimizer)
        with _Waits() as waits:
            result = step(*batch, step=0, measure=measure)
    assert waits.found == []
    assert result.loss.is_meta
    # Not by leaving the packing out.
    assert len(layouts) == (8 if accumulation == 4 else 1)
    assert all(len(layout.rows) == 8 * (BATCH // accumulation) and layout.rows.is_meta for layout in layouts)
    with _Waits() as waits:
        result.loss.item()
    assert waits.found == ["aten._local_scalar_dense.default"]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_levels_in_parts_are_the_normalised_batch(small_model, batch, accumulation):
    """What the loader gives for a GPU, bytes in parts that are no multiple of the chunks, trains the same bits."""
    levels = torch.randint(0, 256, batch[0].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = Normalization(small_model.config.preprocess)(levels)
    found = []
    for images in (whole, levels, Rows([levels[:3], levels[3:4], levels[4:]])):
        step = make_step(copy.deepcopy(small_model), StepOptions(accumulation=accumulation))
        result = step(images, batch[1], step=0)
        found.append({"loss": result.loss, **gradients(step)})
    for others in found[1:]:
        assert all(torch.equal(value, found[0][name]) for name, value in others.items())


def test_next_micro_batch_is_copied_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of work on two streams, of a GPU that isn't there."""
    log: list[str] = []

    class Chunk:
        def __init__(self, number: int) -> None:
            self.number = number

        def to(self, device: Any, non_blocking: bool) -> "Chunk":
            log.append(f"copy {self.number} {'without' if non_blocking else 'with'} a wait, on {streams[-1]}")
            return self

        def record_stream(self, stream: Any) -> None:
            log.append(f"keep {self.number} for {stream}")

    class Compute(str):
        def wait_stream(self, stream: Any) -> None:
            log.append(f"{self} waits for {stream}")

    @contextmanager
    def stream(name: Any) -> Iterator[None]:
        streams.append(name)
        yield
        streams.pop()

    def normalize(chunk: Any) -> Any:
        log.append(f"normalise {chunk.number} on {streams[-1]}")
        return chunk

    compute: Any = Compute("compute")
    streams = [compute]
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    copies: Any = "copies"
    chunks: Any = map(Chunk, range(2))
    for chunk in Upload(chunks, torch.device("cuda"), copies, normalize):  # type: ignore[arg-type]
        number = chunk.number  # type: ignore[attr-defined]
        log += [f"compute {number}"]
    assert log == [
        "copy 0 without a wait, on copies",
        "compute waits for copies",
        "keep 0 for compute",
        "normalise 0 on compute",
        "copy 1 without a wait, on copies",
        "compute 0",
        "compute waits for copies",
        "keep 1 for compute",
        "normalise 1 on compute",
        "compute 1",
    ]
