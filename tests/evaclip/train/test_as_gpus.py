"""A step as one of many GPUs, traced where there is none: it holds what is planned."""

import json
from collections.abc import Callable
from contextlib import closing, nullcontext
from typing import Any

import pytest
from small_tasks import TASKS
from torch._subclasses.fake_tensor import DataDependentOutputException

from evaclip.commands.main import main
from evaclip.plan.job import Job
from evaclip.plan.memory import AVERAGE, plan_memory
from evaclip.plan.recorder import FROZEN
from evaclip.train.as_gpus import pretended, traced_peak
from evaclip.train.config import TrainConfig
from evaclip.train.step import StepResult, TrainStep

OPTIONS = {"embed_dim": 64, "vision": {"width": 128, "layers": 6}, "text": {"width": 64, "layers": 3}}
IMAGE = f"model.options={json.dumps(OPTIONS['vision'])}"
CASES = {
    "shard": ["parallel.mode=shard", "precision=amp_bf16", "model.savings.recompute=block", "ema_decay=0.9"],
    "hybrid": ["parallel={mode: hybrid, shard_size: 2}", "precision=amp_bf16", "optim.name=lamb"],
    "chunks": ["parallel.mode=shard", "accumulation=2"],
    "replicate": ["model.patch_dropout=0.5"],
    "replicate-bf16": ["precision=bf16"],
    "replicate-bf16-chunks": ["precision=bf16", "accumulation=2"],
    "shards-bf16": ["parallel={mode: shard, accumulate: shards}", "precision=bf16", "accumulation=2", "ema_decay=0.9"],
    "classification": ["parallel.mode=shard", "accumulation=2", "ema_decay=0.9"],
    "masked_image": ["parallel.mode=shard", "precision=amp_bf16", "task.teacher.shard=true"],
}

EXHAUSTIVE = ("hybrid", "chunks", "replicate", "replicate-bf16", "replicate-bf16-chunks")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.exhaustive) if name in EXHAUSTIVE else name for name in CASES],
)
def test_the_step_of_one_of_four_holds_what_is_planned(name: str, run_config: Callable[..., TrainConfig]) -> None:
    """The trainer's own step, in its whole depth, with its optimizer, which the plan knows by formulas."""
    task = name if name in TASKS else "clip"
    options = IMAGE if name in TASKS else f"model.options={json.dumps(OPTIONS)}"
    config = run_config("batch_size=256", options, *CASES[name], task=task)
    with closing(pretended("cpu", 4)) as world:
        traced = traced_peak(config, world)
    planned = plan_memory(Job.of(config, 4)).peak
    assert planned.total == pytest.approx(traced.total(), rel=0.02)
    assert traced[AVERAGE] == planned.bytes[AVERAGE]
    assert traced[FROZEN] == planned.bytes[FROZEN]


@pytest.mark.parametrize("waits", [False, True])
def test_traced_step_that_reads_the_device_fails(waits, run_config, monkeypatch):
    """So none does, cut up and in chunks: these tensors have no values that anyone could wait for."""
    original = TrainStep.__call__

    def step(self: TrainStep, *args: Any, **options: Any) -> StepResult:
        result = original(self, *args, **options)
        if waits:
            result.grad_norm.item()
        return result

    monkeypatch.setattr(TrainStep, "__call__", step)
    config = run_config("batch_size=32", "parallel.mode=shard", "accumulation=2")
    expected = pytest.raises(DataDependentOutputException) if waits else nullcontext()
    with closing(pretended("cpu", 4)) as world, expected:
        traced_peak(config, world)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--as-gpus", "4"], "--as-gpus is for a --dry-run"),
        (["--as-gpus", "0", "--dry-run"], "--as-gpus 0; expected at least 1"),
        (["--as-gpus", "64", "--dry-run"], "less than one sample for each of 64 chunks"),
        (["--as-gpus", "4", "--dry-run", "--set", "parallel={mode: shard, offload: cpu}"], "needs a GPU"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
