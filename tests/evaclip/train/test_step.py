"""One optimizer step: exact accumulation, guarded updates, precision, loss scale."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contrastive_step import as_batch, contrastive_step, random_batch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from evaclip.data import Batch
from evaclip.model.clip import CLIP
from evaclip.model.config import Savings
from evaclip.packing import pack_images
from evaclip.plan.step import plan_step
from evaclip.train.build import build_step, build_task, prepare_device
from evaclip.train.config import LossConfig, OptimConfig
from evaclip.train.distributed import World
from evaclip.train.loss import ContrastiveLoss
from evaclip.train.micro_batch import upload
from evaclip.train.step import LossScale, StepOptions, StepResult, TrainStep, split_by_tokens
from evaclip.transforms import Normalization

BATCH = 8


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return random_batch()


def make_step(model, options=None, loss=None, **optim):
    return contrastive_step(model, OptimConfig(**{"lr": 1e-2, **optim}), options, loss)


def gradients(step: TrainStep) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in step.task.model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize(("loss", "packed"), [("clip", False), ("siglip", False), ("clip", True)])
@pytest.mark.parametrize("recompute", ["none", "activations", "block"])
def test_accumulation_equals_the_whole_batch(small_model, batch, loss, recompute, packed):
    """Packed images have 2 to 9 patches; the loader drops patches, the step doesn't."""
    small_model.logit_bias = nn.Parameter(torch.tensor(-10.0))
    small_model.double().visual.patch_dropout = 0.5
    small_model.set_savings(Savings(recompute=recompute))
    images, found = batch[0].double(), []
    if packed:
        images = pack_images([x[:, : 4 * (1 + i % 3), : 4 * (2 + i % 2)] for i, x in enumerate(images)], 4)
    for accumulation in (1, 3):  # of 8 samples
        step = make_step(
            copy.deepcopy(small_model), StepOptions(accumulation_steps=accumulation), LossConfig(name=loss)
        )
        result = step(as_batch(images, batch[1]), step=3)
        found.append((result, gradients(step)))
    (whole, whole_gradients), (chunked, chunked_gradients) = found
    assert whole_gradients.keys() == chunked_gradients.keys()
    assert whole_gradients["logit_scale"].abs() > 1e-4
    assert ("logit_bias" in whole_gradients) == (loss == "siglip")
    torch.testing.assert_close(chunked.loss, whole.loss, rtol=1e-7 if packed else 1e-12, atol=0)
    for name, expected in whole_gradients.items():
        # Positions of packed images are resized in float32.
        slack = 1e-7 * expected.abs().max() if packed else 1e-12
        torch.testing.assert_close(chunked_gradients[name], expected, rtol=1e-7, atol=slack, msg=name)


def plain_loss(name: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The formula of CLIP or of SigLIP."""
    logits, pair = scale * image @ text.T, torch.arange(len(image))
    if name == "clip":
        return (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2
    return -F.logsigmoid((2 * torch.eye(len(image)) - 1) * (logits + bias)).sum() / len(image)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_gradients_equal_autograd_of_whole_batch(small_model, loss, drop_path):
    """Stochastic depth draws the same numbers in both passes of each of four micro-batches."""
    images, tokens = random_batch(torch.float64)
    small_model.logit_bias = nn.Parameter(torch.tensor(-10.0))
    small_model.double()
    for block in small_model.visual.blocks:
        block.drop_path = drop_path
    whole = copy.deepcopy(small_model)
    torch.manual_seed(2)
    features = [whole(*micro_batch)[:2] for micro_batch in zip(images.split(2), tokens.split(2), strict=True)]
    image, text = (torch.cat(parts) for parts in zip(*features, strict=True))
    plain_loss(loss, image, text, whole.logit_scale.exp(), whole.logit_bias).backward()
    torch.manual_seed(2)
    step = make_step(small_model, StepOptions(accumulation_steps=4), LossConfig(name=loss))
    step(as_batch(images, tokens), step=0)
    expected = {name: value.grad for name, value in whole.named_parameters() if value.grad is not None}
    found = gradients(step)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-12, msg=name)


@pytest.mark.parametrize("locked", ["visual", "text"])
def test_locked_tower_runs_once_as_in_evaluation(run_config, locked):
    """Stochastic depth and patch dropout are off in it."""
    options = "model.options.vision={drop_path: 0.9, patch_dropout: 0.5}"
    name = {"visual": "image", "text": "text"}[locked]
    config = run_config(options, f"model.lock_{name}=true", "accumulation_steps=4", "precision=fp32")
    task = build_task(config, World(torch.device("cpu")))
    found: dict[str, list[Tensor]] = {"visual": [], "text": []}
    for tower, module in task.towers.items():
        module.register_forward_hook(lambda module, args, out, tower=tower: found[tower].append(out.detach()))
    step = build_step(config, World(torch.device("cpu")), task)
    images, tokens = random_batch()
    step(as_batch(images, tokens), 0)
    other = {"visual": "text", "text": "visual"}[locked]
    assert (len(found[locked]), len(found[other])) == (4, 8)
    step.task.model.eval()
    expected = step.task.visual(images) if locked == "visual" else task.model.text(tokens)
    torch.testing.assert_close(torch.cat(found[locked][:4]), expected)


def test_locked_blocks_have_no_stochastic_depth(run_config):
    config = run_config("model={lock_image: true, lock_image_unlocked_groups: 2}", "model.options.vision.drop_path=0.9")
    task = build_task(config, World(torch.device("cpu")))
    build_step(config, World(torch.device("cpu")), task)(as_batch(*random_batch()), 0)
    assert [block.training for block in task.visual.blocks] == [False, True]


@pytest.mark.parametrize("lengths", [[9, 1, 1, 1, 9, 9, 4, 2], [1, 1, 1, 90], [90, 1, 1], [3] * 12])
def test_micro_batches_have_equal_tokens(lengths):
    parts = split_by_tokens(torch.tensor(lengths), 3)
    assert [row for part in parts for row in part] == list(range(len(lengths)))
    tokens = [sum(lengths[row] for row in part) for part in parts]
    assert min(tokens) > 0
    assert max(tokens) <= sum(lengths) / 3 + max(lengths)
    if len(set(lengths)) == 1:
        assert len(set(tokens)) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(small_model, batch, optimizer, where):
    step = make_step(small_model, StepOptions(grad_clip_norm=1.0), name=optimizer)
    images, tokens = batch
    step(as_batch(images, tokens), step=0)
    before = copy.deepcopy(small_model.state_dict())
    moments = copy.deepcopy(step.optimizer.state_dict()["state"])
    if where == "loss":
        bad = images.clone()
        bad[0, 0, 0, 0] = math.nan
        result = step(as_batch(bad, tokens), step=1)
    else:
        handle = small_model.text.ln_final.weight.register_hook(lambda gradient: gradient * math.inf)
        result = step(as_batch(images, tokens), step=1)
        handle.remove()
    assert result.found_inf == 1
    for name, value in small_model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for index, state in step.optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, moments[index][key]), key
    step(as_batch(images, tokens), step=2)
    assert (int(step.skipped), int(step.skipped_in_a_row)) == (1, 0)
    assert not torch.equal(small_model.visual.head.weight, before["visual.head.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulation", [1, 8])
def test_16_bit_gradients_are_summed_in_float32(small_model, batch, dtype, accumulation):
    """The sum is that of the micro-batches' gradients in float64. One micro-batch keeps its 16-bit gradient."""
    small_model.to(dtype)
    sums: dict[str, Tensor] = {}
    step = make_step(small_model, StepOptions(accumulation_steps=accumulation, grad_clip_norm=1.0), name="lamb")
    for name, parameter in small_model.named_parameters():
        parameter.register_hook(lambda part, name=name: sums.update({name: sums.get(name, 0.0) + part.double()}))
    for number in range(2):
        sums.clear()
        result = step(as_batch(*batch), number)
        found = gradients(step)
        assert found.keys() == sums.keys()
        for name, gradient in found.items():
            assert gradient.dtype == (dtype if accumulation == 1 else torch.float32), name
            torch.testing.assert_close(gradient.double(), sums[name], rtol=1e-6, atol=1e-6 * sums[name].abs().max())
        norm = torch.cat([value.flatten() for value in sums.values()]).norm()
        torch.testing.assert_close(result.grad_norm.double(), norm, rtol=1e-6, atol=0)
    assert result.found_inf == 0


@pytest.mark.parametrize(
    ("precision", "accumulation"), [("fp32", 1), ("amp_bf16", 2), ("amp_fp16", 1), ("bf16", 2), ("fp16", 2)]
)
def test_every_precision_trains(small_model, batch, precision, accumulation):
    if not precision.startswith("amp"):
        small_model.to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision])
    options = StepOptions(precision=precision, accumulation_steps=accumulation, grad_clip_norm=1.0)
    step = make_step(small_model, options)
    step.loss_scale.scale.clamp_(max=1024.0)
    losses = [step(as_batch(*batch), number).loss for number in range(8)]
    assert losses[0].dtype == torch.float32
    assert int(step.skipped) == 0
    assert losses[-1] < losses[0] - 0.1


def test_amp_computes_the_loss_in_float32(small_model: CLIP, batch: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        image_features, text_features, _ = small_model(*batch)
    expected = ContrastiveLoss(LossConfig())(
        image_features.float(), text_features.float(), small_model.logit_scale.exp()
    )
    found = {
        precision: make_step(copy.deepcopy(small_model), StepOptions(precision=precision))(as_batch(*batch), 0).loss
        for precision in ("fp32", "amp_bf16")
    }
    assert torch.equal(found["amp_bf16"], expected.detach())
    assert not torch.equal(found["amp_bf16"], found["fp32"])


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("precision", ["fp32", "amp_fp16"])
def test_clipping_bounds_the_norm(small_model, batch, precision, optimizer):
    """Of what reaches the moments: the gradients themselves stay as they are, times the loss scale."""
    step = make_step(small_model, StepOptions(precision=precision, grad_clip_norm=0.01), name=optimizer)
    step.loss_scale.scale.clamp_(max=1024.0)
    scale = step.loss_scale.scale.clone()
    result = step(as_batch(*batch), 0)
    norm = torch.stack([gradient.norm() for gradient in gradients(step).values()]).norm() / scale
    averages = [state["exp_avg"].norm() for state in step.optimizer.state.values()]
    assert result.grad_norm > 0.1
    torch.testing.assert_close(result.grad_norm, norm, rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.stack(averages).norm() / (1 - 0.9), torch.tensor(0.01), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("start", "bound"), [(100.0, math.log(100)), (-1.0, 0.0)])
def test_logit_scale_is_clamped(small_model: CLIP, batch: tuple[Tensor, Tensor], start: float, bound: float) -> None:
    torch.nn.init.constant_(small_model.logit_scale, start)
    make_step(small_model, lr=1e-6)(as_batch(*batch), 0)
    assert small_model.logit_scale.item() == pytest.approx(bound)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_how_far_the_towers_moved(small_model: CLIP, batch: tuple[Tensor, Tensor], optimizer: Any) -> None:
    plain = make_step(copy.deepcopy(small_model), name=optimizer)
    step = make_step(small_model, name=optimizer)
    before = copy.deepcopy(small_model)
    unmeasured = plain(as_batch(*batch), 0)
    assert (unmeasured.updates, unmeasured.measures) == (None, None)
    result = step(as_batch(*batch), 0, measure=True)
    for name, found in result.updates.items():
        old = [p.detach().double() for p in getattr(before, name).parameters()]
        new = [p.detach().double() for p in getattr(small_model, name).parameters()]
        change = torch.stack([(n - o).norm() for n, o in zip(new, old, strict=True)]).norm()
        weights = torch.stack([o.norm() for o in old]).norm()
        torch.testing.assert_close(found.double(), torch.stack([change, change / weights]), rtol=1e-4, atol=0)
    for (name, value), other in zip(small_model.named_parameters(), plain.task.model.parameters(), strict=True):
        assert torch.equal(value, other), name


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
    step = make_step(small_model, StepOptions(accumulation_steps=accumulation))
    measures = step(as_batch(*batch), 0, measure=True).measures
    assert measures["accuracy"] == right / BATCH
    torch.testing.assert_close(measures["logit_scale"].float(), small_model.logit_scale.detach().exp())


@pytest.mark.parametrize("accumulation", [1, 4])
def test_levels_in_parts_are_the_normalised_batch(small_model, batch, accumulation):
    """What the loader gives for a GPU, bytes in parts that are no multiple of the chunks, trains the same bits."""
    levels = torch.randint(0, 256, batch[0].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = Normalization(small_model.config.preprocess)(levels)
    found = []
    for pieces in ([whole], [levels], [levels[:3], levels[3:4], levels[4:]]):
        step = make_step(copy.deepcopy(small_model), StepOptions(accumulation_steps=accumulation))
        result = step(Batch(pieces, batch[1]), step=0)
        found.append({"loss": result.loss, **gradients(step)})
    for others in found[1:]:
        assert all(torch.equal(value, found[0][name]) for name, value in others.items())


def test_next_micro_batch_is_copied_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of work on two streams, of a GPU that isn't there."""
    log: list[str] = []

    class Chunk:
        def __init__(self, number: int) -> None:
            self.number = number

        def images_on(self, device: Any, non_blocking: bool) -> "Chunk":
            log.append(f"copy {self.number} on {streams[-1]}")
            assert non_blocking
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
    chunks: Any = map(Chunk, range(2))
    for chunk in upload(chunks, torch.device("cuda"), "copies", normalize):  # type: ignore[arg-type]
        log += [f"compute {chunk.number}"]  # type: ignore[attr-defined]
    first = ["copy 0 on copies", "compute waits for copies", "keep 0 for compute", "normalise 0 on compute"]
    assert log[:6] == [*first, "copy 1 on copies", "compute 0"]


CPU = torch.device("cpu")


@pytest.mark.parametrize("pattern", ["1100001000", "11100000000000"])
def test_loss_scale_follows_grad_scaler(pattern: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    theirs = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    ours = LossScale(CPU, enabled=True, initial=8.0, growth_interval=3)
    for overflow in pattern:
        theirs.scale(torch.zeros(1))
        parameter.grad = torch.full((1,), torch.inf if overflow == "1" else 1.0)
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(float(overflow)))
        assert ours.scale.item() == theirs.get_scale()

    # It stays finite, and never falls below one.
    scale = LossScale(CPU, enabled=True, initial=2.0**127, growth_interval=1)
    scale.update(torch.tensor(0.0))
    assert scale.scale == 2.0**127
    scale = LossScale(CPU, enabled=True, initial=2.0)
    for _ in range(3):
        scale.update(torch.tensor(1.0))
    assert scale.scale == 1


@pytest.fixture
def restored_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize(("precision", "rounded"), [("highest", False), ("high", True)])
def test_float32_matmuls_have_one_precision(precision, rounded, run_config, restored_precision):
    """Convolutions on a GPU round as other matmuls do."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = not rounded
    prepare_device(run_config(), torch.device("cpu"))
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == rounded


@pytest.mark.parametrize(
    ("changes", "waits"),
    [
        (["parallel.mode=shard", "accumulation_steps=2"], False),
        (["parallel.mode=replicate", "optim={name: lamb, grad_clip_norm: 1.0}"], False),
        (["parallel.mode=shard"], True),
    ],
)
def test_step_never_waits_for_the_device(changes, waits, run_config, monkeypatch):
    """Tensors of a traced step have no values that the host could wait for."""
    original = TrainStep.__call__

    def step(self: TrainStep, *args: Any, **options: Any) -> StepResult:
        result = original(self, *args, **{**options, "measure": True})
        if waits:
            result.grad_norm.item()
        return result

    monkeypatch.setattr(TrainStep, "__call__", step)
    config = run_config("batch_size=32", *changes)
    with pytest.raises(DataDependentOutputException) if waits else nullcontext():
        plan_step(config, 4)
