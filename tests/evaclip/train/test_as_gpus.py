"""A dry run as one of many GPUs, traced where there is none."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from torch._subclasses.fake_tensor import DataDependentOutputException

from evaclip.commands.main import main
from evaclip.plan.step import plan_step
from evaclip.train.config import TrainConfig
from evaclip.train.step import StepResult, TrainStep

SMALL = 'model.options={"vision": {"layers": 2}, "text": {"layers": 1}}'


def test_dry_run_prints_memory_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--as-gpus", "4", "--dry-run", "--set", SMALL, "parallel.mode=shard", "ema_decay=0.9"]
    assert main(["train", "tiny", "--device", "cpu", *given]) == 0
    text = capsys.readouterr().out
    for word in ("4 GPUs", "parameters", "optimizer state", "averaged weights", "all"):
        assert word in text


@pytest.mark.parametrize("waits", [False, True])
def test_step_never_waits_for_the_device(
    waits: bool, run_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharded and in micro-batches: tensors of a trace have no values that anyone could wait for."""
    original = TrainStep.__call__

    def step(self: TrainStep, *args: Any, **options: Any) -> StepResult:
        result = original(self, *args, **options)
        if waits:
            result.grad_norm.item()
        return result

    monkeypatch.setattr(TrainStep, "__call__", step)
    config = run_config("batch_size=32", "parallel.mode=shard", "accumulation=2")
    with pytest.raises(DataDependentOutputException) if waits else nullcontext():
        plan_step(config, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--as-gpus", "4"], "--as-gpus is for a --dry-run"),
        (["--as-gpus", "0", "--dry-run"], "gpus must be"),
        (["--as-gpus", "64", "--dry-run"], "64 micro-batches"),
    ],
)
def test_mistake_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
