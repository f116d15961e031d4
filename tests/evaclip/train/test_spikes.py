"""Spikes of the loss are told from noise."""

import math
import random

from evaclip.train.spikes import SpikeDetector


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


def test_noise_and_single_outliers_are_no_spike() -> None:
    assert seen(SpikeDetector(8, 2, 20), [*noise(500), 9.0, *noise(30)]) == []
    assert seen(SpikeDetector(8, 3, 20), [loss + 0.02 * i for i, loss in enumerate(noise(200))]) == []


def test_the_spike_does_not_move_the_measure() -> None:
    detector = SpikeDetector(8, 5, 20)
    assert seen(detector, [*noise(30), *[4.0, 5.0, 7.0, 11.0, 17.0]]) == [34]


def test_spikes_need_history() -> None:
    assert seen(SpikeDetector(8, 1, 20), [*noise(9), 9.0]) == []
    assert seen(SpikeDetector(None, 1, 2), [*noise(9), 9.0, math.nan]) == []


def test_spike_detector_state_is_restored() -> None:
    detector, again = SpikeDetector(8, 3, 20), SpikeDetector(8, 3, 20)
    seen(detector, [*noise(30), 5.0])
    again.load_state_dict(detector.state_dict())
    assert seen(again, [5.0, 5.0]) == [1]
    again.load_state_dict({})
    assert seen(again, [9.0] * 9) == []
