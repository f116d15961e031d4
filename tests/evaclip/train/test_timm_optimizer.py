"""timm's optimizers in runs: the same groups, clipping, skipped steps and resuming as ours."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from contrastive_step import as_batch, contrastive_step, random_batch
from processes import in_processes
from sharded_run import train_all
from torch.multiprocessing import ProcessRaisedException
from trained_runs import assert_equal, checkpoint, records, weights

from evaclip.errors import UserError
from evaclip.plan.step import plan_step
from evaclip.train.config import OptimConfig, TrainConfig
from evaclip.train.trainer import train

Make = Callable[..., TrainConfig]
COMMON = ("optim.grad_clip_norm=0.5", "optim.visual={lr: 2e-3, layer_decay: 0.8}", "log.every_steps=1")


def logged(folder: Path) -> list[float]:
    items = [item for record in records(folder) for item in record.items()]
    return [value for name, value in items if name == "loss" or name.startswith("update_norm")]


def test_timm_adamw_equals_ours(run_config: Make) -> None:
    """Groups, rates, clipping and logged norms agree, also under a loss scale."""
    names = ("adamw", "timm/adamw")
    runs = [train(run_config(*COMMON, f"optim.name={name}", f"name={name}")).folder for name in names]
    assert logged(runs[1]) == pytest.approx(logged(runs[0]), rel=1e-4)
    expected, found = map(weights, runs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["lion", "adopt", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("adan", "lamb", "adafactor"))],
)
def test_timm_optimizer_resumes_bit_exactly(name: str, run_config: Make) -> None:
    """State per tensor, of other shapes, and per group comes back."""
    factored = ["optim.options={min_dim_size_to_factor: 4}"] if name == "adafactor" else []

    def config(run: str, steps: int) -> TrainConfig:
        return run_config(
            *COMMON, *factored, f"optim.name=timm/{name}", f"name={run}", f"schedule={{name: constant, steps: {steps}}}"
        )

    straight = train(config("straight", 6)).folder
    train(config("resumed", 3))
    resumed = train(config("resumed", 6), resume="auto").folder
    for file in ("model", "optimizer/00000"):
        assert_equal(weights(resumed, file=file), weights(straight, file=file))
    found, expected = (torch.load(checkpoint(run) / "state.pt")["moments"] for run in (resumed, straight))
    assert_equal(found, expected)


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_sharded_timm_optimizer_equals_one_rank(run_config: Make, tmp_path: Path) -> None:
    sharded, expected = [], {}
    for name in ("lion", "adopt"):
        options = (*COMMON, f"optim.name=timm/{name}", "schedule={name: constant, steps: 6}")
        expected[name] = train(run_config(*options, f"name={name}")).folder
        run = (*options, "parallel.mode=shard", f"name={name}-sharded", "checkpoint.every_steps=3")
        sharded.append((run_config(*run), "none"))
        # From the checkpoint of step 3 again, in a run of another name.
        resumed = tmp_path / f"{name}-sharded/checkpoints/step_00000003"
        sharded.append((run_config(*run, f"name={name}-resumed"), str(resumed)))
    in_processes(2, train_all, *sharded)
    for name, folder in expected.items():
        assert logged(tmp_path / f"{name}-sharded") == pytest.approx(logged(folder), rel=2e-3, abs=1e-6)
        assert_equal(weights(tmp_path / f"{name}-resumed"), weights(tmp_path / f"{name}-sharded"))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.xdist_group("processes")
def test_factored_timm_state_is_not_sharded(run_config: Make) -> None:
    options = "optim.options={min_dim_size_to_factor: 4}"
    config = run_config("optim.name=timm/adafactor", options, "parallel.mode=shard")
    with pytest.raises(ProcessRaisedException, match=r"timm/adafactor .*parallel\.mode=replicate"):
        in_processes(2, train_all, (config, "none"))


def test_timm_optimizer_skips_nonfinite_step(small_model) -> None:
    step = contrastive_step(small_model, OptimConfig(name="timm/lion", lr=1e-2))
    images, tokens = random_batch()
    before = [parameter.clone() for parameter in small_model.parameters()]
    assert step(as_batch(images * float("nan"), tokens), 0).found_inf == 1
    assert all(map(torch.equal, before, small_model.parameters()))
    step(as_batch(images, tokens), 1)
    assert not all(map(torch.equal, before, small_model.parameters()))


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"name": "timm/lionn"}, r"optim\.name.*did you mean 'timm/lion'"),
        ({"name": "timm/adahessian"}, r"optim\.name"),
        ({"name": "timm/lion", "options": {"cautoin": True}}, r"optim\.options.*cautoin"),
    ],
)
def test_timm_optimizer_errors_name_the_key(optim: dict, message: str, small_model) -> None:
    with pytest.raises(UserError, match=message):
        contrastive_step(small_model, OptimConfig(**optim))(*random_batch(), 0)


def test_missing_timm_names_its_extra(small_model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "timm.optim", raising=False)
    with pytest.raises(UserError, match=r"timm .*evakernels\[clip\]"):
        contrastive_step(small_model, OptimConfig(name="timm/lion"))


@pytest.mark.parametrize("name", ["timm/lion", "lamb"])
def test_another_optimizer_is_not_resumed(name: str, run_config: Make) -> None:
    train(run_config(f"optim.name={name}", "schedule={name: constant, steps: 1}"))
    with pytest.raises(UserError, match=rf"optim\.name must be {name}.*--resume weights:"):
        train(run_config("optim.name=adamw", "schedule={name: constant, steps: 2}"), resume="auto")


def test_timm_optimizer_has_no_plan(run_config: Make) -> None:
    with pytest.raises(UserError, match=r"optim\.name"):
        plan_step(run_config("optim.name=timm/lion"))
