"""Schedules of the learning rate and of the image size, and runs that change the image size."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from small_tasks import OPTIONS
from trained_runs import assert_equal, checkpoint, column, weights

from evaclip.data import Batch
from evaclip.errors import UserError
from evaclip.factory import create_model
from evaclip.model.clip import CLIP
from evaclip.model.config import Savings
from evaclip.train.config import ScheduleConfig, TrainConfig
from evaclip.train.schedule import image_size_at, image_size_phases, lr_factor, total_steps
from evaclip.train.step import StepResult, TrainStep
from evaclip.train.trainer import train
from evaclip.weights.load import load_weights


def test_warm_up_then_half_cosine_to_zero() -> None:
    config = ScheduleConfig(steps=110, warmup_steps=10)
    factors = [lr_factor(step, 110, config) for step in range(111)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == pytest.approx(1.0)
    assert factors[60] == pytest.approx(0.5)
    assert factors[35] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert factors[110] == pytest.approx(0.0)
    assert factors[10:] == sorted(factors[10:], reverse=True)

    config = ScheduleConfig(steps=100, final_factor=0.2)
    assert [lr_factor(step, 100, config) for step in (0, 50, 100)] == pytest.approx([1.0, 0.6, 0.2])


@pytest.mark.parametrize(
    ("cooldown", "middle"), [("linear", 0.2 + 0.8 * 0.75), ("1-sqrt", 0.2 + 0.8 * 0.5)], ids=["linear", "1-sqrt"]
)
def test_warm_up_stable_cooldown(cooldown: str, middle: float) -> None:
    config = ScheduleConfig(
        name="constant", steps=100, warmup_steps=10, cooldown_fraction=0.4, cooldown=cooldown, final_factor=0.2
    )
    factors = [lr_factor(step, 100, config) for step in range(101)]
    assert factors[9:61] == [1.0] * 52
    assert factors[70] == pytest.approx(middle)
    assert factors[100] == pytest.approx(0.2)
    assert factors[60:] == sorted(factors[60:], reverse=True)
    by_steps = replace(config, cooldown_fraction=None, cooldown_steps=40)
    assert [lr_factor(step, 100, by_steps) for step in range(101)] == factors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cooldown_steps": 5}, "name=constant"),
        (
            {"name": "constant", "cooldown_steps": 5, "cooldown_fraction": 0.1},
            "either cooldown_steps or cooldown_fraction",
        ),
        ({"resolutions": [{"image_size": 98, "steps": 3, "fraction": 0.1}]}, "set either steps or fraction"),
        ({"resolutions": 2 * [{"image_size": 98, "fraction": 0.5}]}, "less than 1 together"),
    ],
)
def test_schedule_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(steps=10, **options)


def test_total_steps() -> None:
    for config, expected in (
        (ScheduleConfig(steps=7), 7),
        (ScheduleConfig(epochs=0.5), 7),
        (ScheduleConfig(epochs=3, epoch_samples=16), 6),
    ):
        assert total_steps(config, batch_size=8, data_samples=100) == expected


Make = Callable[..., TrainConfig]
PHASES = "schedule.resolutions=[{image_size: 8, steps: 2}, {image_size: 12, fraction: 0.34}]"


@pytest.mark.parametrize("early_drop", [True, False])
def test_smaller_image_equals_a_smaller_model(small_model: CLIP, early_drop: bool) -> None:
    small = create_model("tiny", **{**OPTIONS, "vision": {**OPTIONS["vision"], "image_size": 8}})
    load_weights(small, small_model.state_dict())
    images, kept = torch.randn(3, 3, 8, 8), torch.tensor([[0, 3], [1, 2], [3, 1]])
    whole = torch.randn(3, 3, 16, 16)
    before = small_model.encode_image(whole)
    small_model.set_savings(Savings(early_drop=early_drop))
    small_model.visual.set_image_size(8)
    for index in (None, kept):
        expected, found = (m.encode_image(images, token_index=index) for m in (small, small_model))
        torch.testing.assert_close(found, expected)
    assert small_model.visual.num_patches == 4
    found.square().sum().backward()
    gradient = small_model.visual.pos_embed.grad
    assert gradient.shape == small_model.visual.pos_embed.shape
    with pytest.raises(ValueError, match=r"\[batch, 3, 8, 8\]"):
        small_model.encode_image(whole)
    small_model.visual.set_image_size(16)
    assert torch.equal(small_model.encode_image(whole), before)


def test_the_course_of_the_size() -> None:
    parts: Any = [{"image_size": 98, "fraction": 0.4}, {"image_size": 154, "steps": 3}]
    config = ScheduleConfig(steps=10, resolutions=parts)
    assert [image_size_at(step, 10, config) for step in range(10)] == [98] * 4 + [154] * 3 + [None] * 3
    assert image_size_phases(10, config) == [(range(4), 98), (range(4, 7), 154), (range(7, 10), None)]

    parts = [{"image_size": 98, "fraction": 0.01}, {"image_size": 154, "steps": 99}, {"image_size": 182, "steps": 2}]
    assert image_size_phases(10, ScheduleConfig(steps=10, resolutions=parts)) == [(range(10), 154)]


def test_resolution_parts_resume_bit_exactly(run_config, tmp_path, monkeypatch):
    original, seen = TrainStep.__call__, list[int]()

    def step(self: TrainStep, batch: Batch, *rest: Any, **options: bool) -> StepResult:
        seen.append(batch.images.shape[-1])
        return original(self, batch, *rest, **options)

    monkeypatch.setattr(TrainStep, "__call__", step)
    common = (PHASES, "checkpoint={every_steps: 1, keep: 9}", "model.patch_dropout=0.25", "eval.every_steps=3")
    evaluated = "eval.sets={val: {data: {train: synthetic, num_samples: 16, workers: 0}}}"
    straight = train(run_config(*common, evaluated)).folder
    assert seen == [8, 8, 12, 12, 16, 16]
    for done in (1, 2, 3):
        found = train(
            run_config(*common, evaluated, f"name=from-{done}"), resume=str(checkpoint(straight, done))
        ).folder
        for key in ("step", "loss", "lr"):
            assert column(found, key) == column(straight, key)[done:]
        for file in ("model", "optimizer/00000"):
            assert_equal(weights(found, file=file), weights(straight, file=file))


def test_the_past_keeps_its_size(run_config: Make, tmp_path: Path) -> None:
    common = ("schedule={name: constant, steps: 2}", "data.num_samples=16")
    train(run_config(*common, "schedule.resolutions=[{image_size: 8, steps: 9}]"))
    with pytest.raises(UserError, match=r"step 2 had 1 of the peak rate and images of 8 pixels, and would now have 1"):
        train(run_config(*common, "schedule.resolutions=[{image_size: 8, steps: 1}]"), resume="auto")
    longer = ("schedule.steps=3", "schedule.resolutions=[{image_size: 8, steps: 2}]")
    assert train(run_config(*common, *longer), resume="auto").steps == 3
