"""The learning rate's course and the length of a run."""

import math
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from evaclip.train.config import ScheduleConfig
from evaclip.train.schedule import lr_factor, total_steps


def test_a_share_of_the_steps_is_warm_up() -> None:
    by_share, by_steps = ScheduleConfig(steps=110, warmup_share=0.1), ScheduleConfig(steps=110, warmup_steps=11)
    assert [lr_factor(step, 110, by_share) for step in range(110)] == [lr_factor(s, 110, by_steps) for s in range(110)]


def test_warm_up_then_half_cosine_to_zero() -> None:
    config = ScheduleConfig(steps=110, warmup_steps=10)
    factors = [lr_factor(step, 110, config) for step in range(111)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == pytest.approx(1.0)
    assert factors[60] == pytest.approx(0.5)
    assert factors[35] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert factors[110] == pytest.approx(0.0)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_cosine_ends_at_the_final_factor() -> None:
    config = ScheduleConfig(steps=100, final_factor=0.2)
    assert lr_factor(0, 100, config) == 1.0
    assert lr_factor(50, 100, config) == pytest.approx(0.6)
    assert lr_factor(100, 100, config) == pytest.approx(0.2)


def test_constant_stays_after_warm_up() -> None:
    config = ScheduleConfig(name="constant", steps=10, warmup_steps=4)
    assert [lr_factor(step, 10, config) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_warm_up_may_be_the_whole_run() -> None:
    config = ScheduleConfig(steps=4, warmup_steps=4)
    assert lr_factor(3, 4, config) == 1.0
    assert math.isfinite(lr_factor(4, 4, config))


@pytest.mark.parametrize(
    ("cooldown", "middle"), [("linear", 0.2 + 0.8 * 0.75), ("1-sqrt", 0.2 + 0.8 * 0.5)], ids=["linear", "1-sqrt"]
)
def test_warm_up_stable_cooldown(cooldown: str, middle: float) -> None:
    config = ScheduleConfig(
        name="constant", steps=100, warmup_steps=10, cooldown_share=0.4, cooldown=cooldown, final_factor=0.2
    )
    factors = [lr_factor(step, 100, config) for step in range(101)]
    assert factors[9:61] == [1.0] * 52
    assert factors[70] == pytest.approx(middle)
    assert factors[100] == pytest.approx(0.2)
    assert factors[60:] == sorted(factors[60:], reverse=True)
    by_steps = replace(config, cooldown_share=None, cooldown_steps=40)
    assert [lr_factor(step, 100, by_steps) for step in range(101)] == factors


def test_a_cooldown_begins_after_the_warm_up() -> None:
    config = ScheduleConfig(name="constant", steps=10, warmup_steps=5, cooldown_steps=8, cooldown="linear")
    assert [lr_factor(step, 10, config) for step in (4, 5, 6)] == [1.0, 1.0, pytest.approx(0.8)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cooldown_steps": 5}, "a cooldown needs name=constant; cosine falls all the time"),
        ({"name": "constant", "cooldown_steps": 5, "cooldown_share": 0.1}, "either cooldown_steps or cooldown_share"),
    ],
)
def test_cooldowns_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(steps=10, **options)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ScheduleConfig(steps=7), 7),
        (ScheduleConfig(epochs=2), 25),
        (ScheduleConfig(epochs=0.5), 7),
        (ScheduleConfig(epochs=3, epoch_samples=16), 6),
    ],
)
def test_length(config: ScheduleConfig, expected: int) -> None:
    assert total_steps(config, batch_size=8, data_samples=100) == expected
