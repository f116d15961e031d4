"""Sharded over processes, a training is what it is in one."""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from contrastive_step import as_batch, random_batch
from processes import in_processes
from sharded_run import train_all
from small_tasks import TASKS
from torch.distributed.tensor import DTensor
from trained_runs import assert_equal, checkpoint, column, records, weights

from evaclip.plan.step import plan_step
from evaclip.train import rng, sharding
from evaclip.train.build import build_step, build_task
from evaclip.train.config import TrainConfig
from evaclip.train.distributed import connect
from evaclip.train.trainer import train
from evaclip.weights.files import read_tensors
from evaclip.weights.shards import read, read_metadata

STEPS = 4
COMMON = (
    "batch_size=16", "optim.name=lamb", "optim.grad_clip_norm=0.5", "ema_decay=0.9", "data.num_samples=96",
)  # fmt: skip
MODES = {
    "replicate": ["parallel.mode=replicate"],
    "shard": ["parallel.mode=shard", "model.savings.recompute=block"],
    "hybrid": [
        "parallel={mode: hybrid, shard_size: 2, reshard_after_forward: false, accumulate: shards}",
        "model.savings.recompute=activations",
    ],
}
EVAL = "eval={sets: {val: {data: {num_samples: 112, workers: 0}, skip: 96, samples: 13}}, batch_size: 3}"


def losses(folder: Path) -> list[float]:
    return column(folder, "loss")


def update_norms(folder: Path) -> list[float]:
    items = [item for record in records(folder) for item in record.items()]
    return [value for name, value in items if name.startswith("update_norm_")]


def read_moments(folder: Path) -> dict[str, torch.Tensor]:
    moments = {name: torch.zeros_like(like, device="cpu") for name, like in read_metadata(folder).items()}
    read(moments, folder)
    return moments


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("task", TASKS)
def test_unequal_parts_of_a_batch_equal_one(task: str, run_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Of 16 samples 5, 5 and 6, and the 5 in chunks of 2 and 3, or as many pairs; then two processes go on."""
    run_config = partial(run_config, *COMMON, *TASKS[task].patch_dropout, task=task)
    common = ["batch_size=16", "checkpoint.every_steps=4", "accumulation_steps=2"]
    more = [*common, "schedule={steps: 6, name: constant}"]
    one = train(run_config(*more, "name=one")).folder
    part = "schedule={steps: 4, name: constant}"
    modes = ("replicate", "shard")
    begun = [run_config(*common, part, f"parallel.mode={mode}", f"name={mode}") for mode in modes]
    in_processes(3, train_all, *((config, "none") for config in begun))
    goes_on = [run_config(*more, f"parallel.mode={mode}", f"name={mode}") for mode in modes]
    in_processes(2, train_all, *((config, "auto") for config in goes_on))
    for mode in modes:
        assert losses(tmp_path / mode) == pytest.approx(losses(one), rel=1e-5, abs=1e-6), mode
        assert update_norms(tmp_path / mode) == pytest.approx(update_norms(one), rel=2e-3), mode
        for step, file in ((4, "model"), (6, "model"), (6, "ema")):
            expected, found = weights(one, step, file), weights(tmp_path / mode, step, file)
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=f"{mode} {step} {file} {key}")


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.xdist_group("processes")
def test_other_numbers_of_processes_go_on(run_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """4 processes, then 2 with compiled blocks, then 3, then one that isn't sharded: one loss curve.

    One after the other the processes train all tasks; blocks of some of them are the same to the compiler.
    """

    def part(task: str, name: str, steps: int, *more: str) -> TrainConfig:
        # A constant rate: the schedule would otherwise depend on where the run is to end. 36 samples: three epochs.
        common = ["batch_size=12", "data.num_samples=36", f"schedule={{steps: {steps}, name: constant}}"]
        return run_config(*COMMON, *TASKS[task].patch_dropout, *common, f"name={task}-{name}", *more, task=task)

    def parts(steps: int, mode: str) -> list[TrainConfig]:
        return [part(task, "parts", steps, *MODES[mode]) for task in TASKS]

    def compiled(task: str) -> list[str]:
        # Blocks that are computed again take twice as many graphs: one task is enough to show them.
        recompute = "block" if task == "masked_image" else "none"
        return [*MODES["shard"], "compile=blocks", f"model.savings.recompute={recompute}"]

    straight = {task: train(part(task, "straight", 8)).folder for task in TASKS}
    in_processes(4, train_all, *((config, "none") for config in parts(2, "hybrid")))
    in_processes(2, train_all, *((part(task, "parts", 4, *compiled(task)), "auto") for task in TASKS))
    in_processes(3, train_all, *((config, "auto") for config in parts(6, "shard")))
    for config in parts(8, "shard"):
        train(config, resume="auto")
    for task, one in straight.items():
        folder = tmp_path / f"{task}-parts"
        assert losses(folder) == pytest.approx(losses(one), rel=1e-5, abs=1e-6), task
        assert records(folder)[-1]["samples"] == records(one)[-1]["samples"], task


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.xdist_group("processes")
def test_padded_hidden_width_keeps_checkpoints(
    run_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps of two ranks at EVA02-L's 2,730 hidden channels; a resumed run is bit-exact."""
    common = [*COMMON, *TASKS["clip"].patch_dropout, "model.options.vision.mlp_ratio=170.6251", *MODES["shard"]]

    def run(name: str, steps: int) -> TrainConfig:
        return run_config(*common, f"schedule={{steps: {steps}, name: constant}}", f"name={name}")

    for setting, runs in {
        "0": [(run("plain", 20), "none")],
        "1": [(run("padded", 20), "none"), (run("parts", 10), "none"), (run("parts", 20), "auto")],
    }.items():
        monkeypatch.setenv("EVAKERNELS_PAD_HIDDEN", setting)
        in_processes(2, train_all, *runs)
    assert losses(tmp_path / "padded") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4, abs=1e-6)
    for name in ("model.safetensors", "ema.safetensors", "optimizer"):
        places = (checkpoint(tmp_path / run, 20) / name for run in ("plain", "padded", "parts"))
        plain, padded, parts = (read_moments(path) if name == "optimizer" else read_tensors(path) for path in places)
        assert {key: value.shape for key, value in padded.items()} == {key: v.shape for key, v in plain.items()}
        assert all(torch.equal(value, parts[key]) for key, value in padded.items())
        for key, value in plain.items():
            torch.testing.assert_close(padded[key], value, rtol=1e-2, atol=1e-4, msg=key)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.xdist_group("processes")
def test_sixteen_bits(run_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """The first losses are those of one process but for rounding; parameters have the dtype that they should."""
    common = [*COMMON, *TASKS["clip"].patch_dropout, "schedule.steps=2", "optim.lr=1e-4"]
    dtypes = {"amp_bf16": torch.float32, "bf16": torch.bfloat16}
    sharded = []
    for precision in dtypes:
        same = [*common, f"precision={precision}", f"optim.stochastic_rounding={precision == 'bf16'}"]
        train(run_config(*same, f"name={precision}"))
        sharded.append(run_config(*same, *MODES["shard"], "parallel.offload=cpu", f"name=two-{precision}"))
    in_processes(2, train_all, *((config, "none") for config in sharded))
    for precision, dtype in dtypes.items():
        two = tmp_path / f"two-{precision}"
        assert losses(two) == pytest.approx(losses(tmp_path / precision), rel=2e-2), precision
        assert {value.dtype for value in weights(two, 2).values() if value.ndim > 1} == {dtype}


def train_as_before(config: TrainConfig) -> None:
    """With position embeddings, class and mask tokens sharded like all others."""
    with patch.object(sharding, "_is_one_row", lambda parameter: False):
        train_all((config, "none"))


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize(
    ("task", "precision"), [("clip", "fp32"), ("masked_image", "amp_bf16"), ("native", "fp32"), ("clip", "amp_bf16")]
)
def test_whole_tokens_continue_a_sharded_run(task, precision, run_config, tmp_path):
    """Position embeddings, class and mask tokens stay whole; checkpoints are those of a run that shards them."""
    run_config = partial(run_config, *COMMON, f"precision={precision}", *MODES["shard"], task=task)
    common = ["accumulation_steps=2", "checkpoint.every_steps=2"]
    before = run_config(*common, "schedule={steps: 4, name: constant}", "name=before")
    resumed = run_config(*common, "schedule={steps: 6, name: constant}", "name=before")
    straight = run_config(*common, "schedule={steps: 6, name: constant}", "name=straight")
    in_processes(2, train_as_before, before)
    in_processes(2, train_all, (resumed, "auto"), (straight, "none"))
    assert losses(tmp_path / "before") == losses(tmp_path / "straight")
    for name in ("model.safetensors", "ema.safetensors", "optimizer"):
        found, expected = (
            read_moments(path / name) if name == "optimizer" else read_tensors(path / name)
            for path in (checkpoint(tmp_path / "before"), checkpoint(tmp_path / "straight"))
        )
        assert_equal(found, expected)


def test_tokens_are_not_padded_per_rank(run_config: Callable[..., TrainConfig]) -> None:
    """As many bytes are gathered on 64 ranks as on 2; a position embedding padded to 64 rows would add 2 %."""
    wide = "model.options={embed_dim: 64, vision: {width: 64, heads: 1}, text: {width: 64, heads: 1, layers: 1}}"
    config = run_config("batch_size=64", "parallel.mode=shard", wide)
    few, many = (plan_step(config, ranks).received["all-gather"] * ranks / (ranks - 1) for ranks in (2, 64))
    assert many < 1.005 * few


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_hybrid_reduces_between_replicas_once(run_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """With four micro-batches, each reduced within its replica: the all-reduces of one, and one rank's results."""
    run_config = partial(run_config, *COMMON, *TASKS["clip"].patch_dropout, "accumulation_steps=4", "schedule.steps=3")
    one = train(run_config("name=one")).folder
    in_processes(4, train_all, (run_config(*MODES["hybrid"], "name=four"), "none"))
    assert losses(tmp_path / "four") == pytest.approx(losses(one), rel=1e-5, abs=1e-6)
    for key, value in weights(one, 3).items():
        torch.testing.assert_close(weights(tmp_path / "four", 3)[key], value, rtol=1e-3, atol=1e-4, msg=key)
    parallel = "parallel={mode: hybrid, shard_size: 2, accumulate: shards}"
    plans = [plan_step(run_config(parallel, f"accumulation_steps={count}"), 4) for count in (1, 4)]
    assert plans[1].received["all-reduce"] == pytest.approx(plans[0].received["all-reduce"], rel=0.01)
    assert plans[1].received["reduce-scatter"] == pytest.approx(4 * plans[0].received["reduce-scatter"], rel=0.01)


def test_16_bit_shards_are_summed_in_float32(run_config: Callable[..., TrainConfig]) -> None:
    """Reduced after every micro-batch they are what whole gradients are, which FSDP sums in float32."""
    found = []
    for accumulate in ("whole", "shards"):
        parallel = f"parallel={{mode: shard, offload: cpu, accumulate: {accumulate}}}"
        config = run_config(parallel, "precision=bf16", "batch_size=32", "accumulation_steps=32")
        with closing(connect("cpu", config.parallel)) as world:
            rng.seed_all(0, 0)
            task = build_task(config, world)
            build_step(config, world, task)(as_batch(*random_batch(rows=32)), 0)
            cut = [parameter for parameter in task.model.parameters() if isinstance(parameter, DTensor)]
            found.append(torch.cat([parameter.grad.to_local().double().flatten() for parameter in cut]))
    # Whole ones are rounded to bfloat16 once.
    assert (found[1] - found[0]).norm() < 2**-8 * found[0].norm()


@pytest.mark.parametrize("task", TASKS)
def test_offload_of_one_process_changes_nothing(task, run_config, tmp_path):
    """On a CPU host memory is where all lies already; the run is sharded over one process, stopped and resumed."""
    run_config = partial(run_config, *COMMON, *TASKS[task].patch_dropout, task=task)
    common = ["schedule={steps: 6, name: constant}", "checkpoint.every_steps=3", EVAL]
    plain = train(run_config(*common, "name=plain"))
    offloaded = run_config(*common, "parallel={mode: shard, offload: cpu}", "name=offloaded")
    outcome = train(offloaded)
    assert losses(outcome.folder) == pytest.approx(losses(plain.folder), rel=1e-6)
    assert outcome.metrics == pytest.approx(plain.metrics)
    (checkpoint(outcome.folder) / "state.pt").unlink()
    train(offloaded, resume="auto")
    for file in ("model", "ema"):
        expected, found = weights(plain.folder, file=file), weights(outcome.folder, file=file)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=f"{file} {key}")
    assert not torch.distributed.is_initialized()
