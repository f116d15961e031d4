"""What a task whose loss is a mean over samples gets from the trainer: exact gradients, however the batch is cut."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from image_labels import CLASSES, ImageLabels
from processes import in_processes
from torch import Tensor
from torch.distributed.tensor import DTensor

from evaclip.data.loader import part_of_batch
from evaclip.train.config import OptimConfig, ParallelConfig
from evaclip.train.distributed import World, connect
from evaclip.train.optimizer import build_optimizer, parameter_groups, tower_rate
from evaclip.train.sharding import shard
from evaclip.train.step import StepOptions, TrainStep
from evaclip.train.token_sampling import token_index

BATCH = 7
STEP = 3
ALONE = World(torch.device("cpu"))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.randint(CLASSES, (BATCH,), generator=generator)


def label_step(world: World, accumulation: int = 1, mode: Any = "replicate") -> TrainStep:
    model = ImageLabels.create_model().double()
    model.patch_dropout = 0.5
    if mode == "shard":
        shard([model], ParallelConfig(mode=mode), "fp32", world)
    task = ImageLabels(model, ImageLabels.towers_of(model), model.preprocess)
    config = OptimConfig(lr=0.0)
    rows = part_of_batch(BATCH, world.rank, world.size)
    options = StepOptions(accumulation=accumulation, first_row=rows.start, batch_size=BATCH)
    return TrainStep(task, build_optimizer(parameter_groups(model, task.towers, config), config), options, world)


def outcome(step: TrainStep) -> dict[str, Tensor]:
    """Loss, accuracy and gradients of one step, of all processes."""
    rows = part_of_batch(BATCH, step.world.rank, step.world.size)
    images, labels = (part[rows.start : rows.stop] for part in batch())
    result = step(images, labels, STEP, measure=True)
    gradients = {name: p.grad for name, p in step.task.model.named_parameters() if p.grad is not None}
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    return {"loss": result.loss, "accuracy": result.measures["accuracy"], **whole}


def expected() -> dict[str, Tensor]:
    """By autograd of the mean over the whole batch."""
    model = ImageLabels.create_model().double()
    images, labels = batch()
    kept = token_index((0, STEP), range(BATCH), model.num_patches, model.num_patches // 2, images.device)
    logits = model(images, token_index=kept)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "accuracy": (logits.argmax(-1) == labels).double().mean(), **gradients}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_chunks_add_up_to_the_mean_over_the_batch(accumulation: int) -> None:
    torch.testing.assert_close(outcome(label_step(ALONE, accumulation)), expected(), rtol=1e-9, atol=1e-14)


def write_outcomes(folder: Path) -> None:
    with closing(connect("cpu")) as world:
        for mode in ("replicate", "shard"):
            found = outcome(label_step(world, 2, mode))
            if world.is_main:
                torch.save(found, folder / mode)


@pytest.mark.xdist_group("processes")
def test_unequal_parts_of_processes_add_up_to_it(tmp_path: Path) -> None:
    """3 and 4 samples, in chunks of 1, 2, 2 and 2; shards are summed in float32."""
    in_processes(2, write_outcomes, tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "replicate"), expected(), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(torch.load(tmp_path / "shard"), expected(), rtol=1e-5, atol=1e-7)


def test_image_tower_options_of_image_models() -> None:
    model = ImageLabels.create_model()
    config: Any = {"lr": 1.0, "visual": {"lr": 0.5, "weight_decay": 0.2, "layer_decay": 0.5}}
    groups = parameter_groups(model, ImageLabels.towers_of(model), OptimConfig(**config))
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["visual.layer00.decay"] == 0.5 * 0.5**3
    assert rates["visual.layer03.decay"] == 0.5
    assert {group["weight_decay"] for group in groups} == {0.0, 0.2}
    assert tower_rate(build_optimizer(groups, OptimConfig(lr=1.0)), "visual") == 0.5


def test_a_step_tells_of_the_one_tower_there_is() -> None:
    result = label_step(ALONE)(*batch(), STEP, measure=True)
    of_tower = {f"{kind}_visual" for kind in ("grad_norm", "update_norm", "update_ratio")}
    assert result.named().keys() == {"accuracy", *of_tower}
    assert result.tower_norms["visual"] == result.grad_norm
