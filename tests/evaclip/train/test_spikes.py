"""Loss spikes are distinguished from noise, and the run returns to a checkpoint."""

import math
import random
import re
from collections.abc import Callable
from dataclasses import replace

import torch
from trained_runs import assert_equal, checkpoint, column, evaluations, records, steps, weights

from evaclip.data import Batch
from evaclip.train.checkpoint import load_state
from evaclip.train.config import TrainConfig
from evaclip.train.step import StepResult, TrainStep
from evaclip.train.trainer import SpikeDetector, train

Make = Callable[..., TrainConfig]


def seen(detector: SpikeDetector, losses: list[float]) -> list[int]:
    return [i for i, loss in enumerate(losses) if detector.saw(loss)]


def noise(count: int, middle: float = 2.0) -> list[float]:
    rng = random.Random(0)
    return [middle + rng.gauss(0, 0.1) for _ in range(count)]


def test_a_jump_that_stays_is_found_once() -> None:
    detector = SpikeDetector(8, 3, 20)
    assert seen(detector, [*noise(30), 5.0, 5.0]) == []
    assert not detector.is_calm
    assert seen(detector, [5.0]) == [0]
    assert seen(detector, [5.0, 5.0]) == []

    # The spike itself does not move the measure.
    assert seen(SpikeDetector(8, 5, 20), [*noise(30), *[4.0, 5.0, 7.0, 11.0, 17.0]]) == [34]


def test_noise_and_single_outliers_are_no_spike() -> None:
    assert seen(SpikeDetector(8, 2, 20), [*noise(500), 9.0, *noise(30)]) == []
    assert seen(SpikeDetector(8, 3, 20), [loss + 0.02 * i for i, loss in enumerate(noise(200))]) == []
    assert seen(SpikeDetector(8, 1, 20), [*noise(9), 9.0]) == []
    assert seen(SpikeDetector(None, 1, 2), [*noise(9), 9.0, math.nan]) == []


def test_a_spike_goes_back_and_leaves_the_data_out(run_config, monkeypatch, capsys):
    original = TrainStep.__call__
    calls = []

    def spiking(self: TrainStep, batch: Batch, step: int, **options: bool) -> StepResult:
        calls.append(step)
        result = original(self, batch, step, **options)
        return replace(result, loss=result.loss + (100 if 8 <= len(calls) <= 9 else 0))

    monkeypatch.setattr(TrainStep, "__call__", spiking)
    spikes = "spikes={threshold_sigma: 20, patience: 2, window: 8}"
    measured = "eval={every_steps: 7, sets: {val: {data: {num_samples: 4, workers: 0}}}}"
    outcome = train(run_config(spikes, "checkpoint={every_steps: 1, keep: 99}", "schedule.steps=10", measured))
    assert "up to step 9: went back to step_00000007" in capsys.readouterr().out
    assert list(evaluations(outcome.folder)) == [7, 10]
    assert column(outcome.folder, "step") == [1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 9, 10]
    assert records(outcome.folder)[-1]["samples"] == 12 * 8
    assert steps(outcome.folder) == list(range(1, 11))


def test_spike_detector_returns_with_the_weights(run_config, monkeypatch, capsys):
    """The loss of the restored weights is far above the loss before the spike, and no spike."""
    original = TrainStep.__call__
    calls = []

    def step(self: TrainStep, batch: Batch, step: int, **options: bool) -> StepResult:
        calls.append(step)
        loss = 100.0 if 20 <= len(calls) <= 21 else 3.0 - (step >= 12) + 0.01 * (step % 3)
        return replace(original(self, batch, step, **options), loss=torch.tensor(loss))

    monkeypatch.setattr(TrainStep, "__call__", step)
    saving = "checkpoint={every_steps: 10, keep: 99}"
    outcome = train(run_config("spikes={threshold_sigma: 20, patience: 2, window: 8}", saving, "schedule.steps=24"))
    text = capsys.readouterr().out
    assert [line.split(":")[0] for line in re.findall("went back to (.*),", text)] == ["step_00000010"]
    assert outcome.steps == 24


def test_spike_detector_is_resumed(run_config: Make) -> None:
    config = run_config("spikes={threshold_sigma: 1e9, window: 4}", "checkpoint.every_steps=3", "schedule.steps=6")
    folder = train(config).folder
    losses, straight = column(folder, "loss"), weights(folder)
    for step in (3, 6):
        state = load_state(checkpoint(folder, step))
        assert state["spikes"] == {"ordinary": losses[max(0, step - 4) : step], "suspicious": 0}
    (checkpoint(folder) / "state.pt").unlink()
    train(config, resume="auto")
    assert load_state(checkpoint(folder))["spikes"]["ordinary"] == losses[2:]
    assert_equal(weights(folder), straight)
