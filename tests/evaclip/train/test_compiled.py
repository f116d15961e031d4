"""Compiled blocks train what eager blocks train. Sharded ones: test_sharding.py."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from evaclip.train import build
from evaclip.train.compiled import compile_blocks
from evaclip.train.config import TrainConfig
from evaclip.train.progress import read_log
from evaclip.train.trainer import train

COMMON = (
    "model.options.vision.layers=3", "model.patch_dropout=0.5", "model.savings.recompute=block", "accumulation=2",
    "optim.name=lamb", "schedule.steps=2",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are taken and split into forward and backward, but run by torch's operators: no compiler is waited for."""
    monkeypatch.setattr(build, "compile_blocks", partial(compile_blocks, backend="aot_eager"))


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_log(folder / "log.jsonl") if "loss" in record]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_losses_are_those_of_eager_blocks(without_code: None, run_config: Callable[..., TrainConfig]) -> None:
    eager = train(run_config(*COMMON, "name=eager"))
    assert not counters["stats"]
    compiled = train(run_config(*COMMON, "name=compiled", "compile=blocks"))
    assert losses(compiled.folder) == pytest.approx(losses(eager.folder), rel=1e-5)
    # Two kinds of image blocks, the last one is another, and a text block; each with gradients and without.
    assert counters["stats"]["unique_graphs"] == 6
    last = "checkpoints/step_00000002/model.safetensors"
    found, expected = load_file(compiled.folder / last), load_file(eager.folder / last)
    assert found.keys() == expected.keys()
