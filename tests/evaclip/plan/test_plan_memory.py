"""Planned memory is that of real steps, and a few blocks stand for all."""

from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from measured import peak_of_step

from evaclip import Savings
from evaclip.data.config import DataConfig
from evaclip.errors import UserError
from evaclip.plan import recorder
from evaclip.plan.recorder import AVERAGE, CASTS, FROZEN, OPTIMIZER, PARAMETERS, WHOLE_GRADIENTS, Recorder, local
from evaclip.plan.step import plan_step
from evaclip.train.build import build_step, build_task
from evaclip.train.config import (
    ClassificationTask,
    EvalConfig,
    MaskedImageTask,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ScheduleConfig,
    TeacherConfig,
    TrainConfig,
)
from evaclip.train.distributed import connect
from evaclip.train.recipes import get_recipe


def run_of(name: str, options: dict[str, Any], batch: int = 16, **changes: Any) -> TrainConfig:
    """The configuration of a run; `dropout` and `savings` are the model's."""
    model = ModelConfig(
        name=name,
        options=options,
        patch_dropout=changes.pop("dropout", None),
        savings=changes.pop("savings", Savings()),
    )
    given = {"precision": "fp32", "parallel": ParallelConfig(mode="replicate"), **changes}
    return TrainConfig(
        name="plan", batch_size=batch, data=DataConfig(train=""), schedule=ScheduleConfig(steps=1), model=model, **given
    )


B = {"vision": {"width": 384, "heads": 6, "layers": 7}, "text": {"width": 256, "heads": 4, "layers": 6}}
NARROW = {"vision": {"width": 192, "heads": 3, "layers": 7}, "text": {"width": 128, "heads": 2, "layers": 6}}
E = {
    "vision": {"width": 256, "heads": 4, "layers": 7, "mlp_ratio": 6.0},
    # Few words: a CPU's operators allocate memory for a large embedding that a GPU's don't.
    "text": {"width": 256, "heads": 4, "layers": 6, "vocab_size": 1000},
}
IMAGE = {"width": 192, "heads": 3, "layers": 7, "image_size": 112, "drop_path": 0.1}
TEACHER = TeacherConfig(name="EVA01-CLIP-g-14", options={"vision": {"width": 256, "layers": 8}, "embed_dim": 256})
MIXED = ClassificationTask(classes=10, mixup=0.8, mix_mode="elem")
TASK = MaskedImageTask(teacher=TEACHER, smallest_block=4)
LAMB, SHARD = OptimConfig(name="lamb"), ParallelConfig(mode="shard")
BLOCK, ACTIVATIONS = Savings(recompute="block"), Savings(recompute="activations")

CLIP_B, CLIP_E = "EVA02-CLIP-B-16", "EVA02-CLIP-bigE-14"
CLASSIFIER, STUDENT = ("eva02_base_patch14_448", IMAGE), ("eva02_base_patch14_224", IMAGE)
STEPS: dict[str, tuple[TrainConfig, int]] = {
    "B": (run_of(CLIP_B, NARROW, optim=LAMB), 1),
    "B-activations": (run_of(CLIP_B, B, dropout=0.5, savings=ACTIVATIONS, precision="amp_bf16"), 1),
    "E-micro-batches": (run_of(CLIP_E, E, accumulation=2), 1),
    "E-block-one-of-144": (run_of(CLIP_E, E, 16 * 144, dropout=0.5, savings=BLOCK, parallel=SHARD), 144),
    "classifier-mixed": (run_of(*CLASSIFIER, task=replace(MIXED), accumulation=2), 1),
    "classifier-one-of-4": (
        run_of(*CLASSIFIER, 64, task=ClassificationTask(classes=1000), accumulation=2, parallel=SHARD), 4,
    ),
    "student-bf16": (run_of(*STUDENT, task=TASK, precision="amp_bf16", savings=BLOCK), 1),
    "student-one-of-4": (
        run_of(*STUDENT, 64, task=replace(TASK, teacher=replace(TEACHER, shard=True)), parallel=SHARD), 4,
    ),
}  # fmt: skip
QUICK = ("B", "E-block-one-of-144", "classifier-mixed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.exhaustive) for name in STEPS]
)
def test_peak_matches_real_step(name: str) -> None:
    config, gpus = STEPS[name]
    if config.precision != "fp32" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no instructions for bfloat16: torch needs minutes for a step")
    planned, measured = plan_step(config, gpus).memory.total(), peak_of_step(config, gpus)
    print(f"| {name} | {planned / 1e6:,.1f} MB | {measured / 1e6:,.1f} MB | {planned / measured:.4f} |")
    assert planned == pytest.approx(measured, rel=0.01)


L, BIG_E = "EVA02-CLIP-L-14", "EVA02-CLIP-bigE-14"
NINE = {"vision": {"layers": 9, "width": 256, "heads": 4}, "text": {"layers": 8}}
NINE_BLOCKS = {
    "shard": run_of(L, NINE, 16 * 64, savings=BLOCK, parallel=SHARD),
    "hybrid": run_of(BIG_E, NINE, 16 * 64, parallel=ParallelConfig(mode="hybrid", shard_size=8)),
    "keep": run_of(L, NINE, 16 * 64, savings=ACTIVATIONS, parallel=ParallelConfig(mode="shard", reshard=False)),
    "replicate-amp": run_of(BIG_E, NINE, 16 * 64, savings=BLOCK, precision="amp_bf16"),
    "micro-batches": run_of(L, NINE, 16 * 64, accumulation=2, parallel=SHARD, precision="amp_bf16"),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NINE_BLOCKS)
def test_five_blocks_equal_nine(name: str) -> None:
    few, whole = (plan_step(NINE_BLOCKS[name], 16, blocks=blocks) for blocks in (5, None))
    assert few.parameters == whole.parameters
    assert few.memory.total() == pytest.approx(whole.memory.total(), rel=2e-3)
    assert few.flops == whole.flops
    assert few.received == pytest.approx(whole.received, rel=1e-3)


@pytest.mark.slow
def test_5b_model_on_one_gpu() -> None:
    recipe = replace(get_recipe("eva02-e-14-plus"), batch_size=8)
    plan = plan_step(recipe)
    assert plan.parameters == plan.model_parameters == 5_044_889_089
    assert plan.memory[PARAMETERS] == 4 * 5_044_889_089
    assert plan.memory[OPTIMIZER] == pytest.approx(8 * 5_044_889_089, rel=1e-6)
    assert plan.checkpoint_bytes == pytest.approx(12 * 5_044_889_089, rel=1e-6)


TINY = {"embed_dim": 16, "vision": {"width": 16, "layers": 2, "heads": 2, "image_size": 16, "patch_size": 4}}


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "adamw"), ("bf16", "lamb")])
def test_offloaded_bytes_match_real_step(precision: str, optimizer: str) -> None:
    parallel = ParallelConfig(mode="shard", offload="cpu")
    optim = OptimConfig(name=optimizer, stochastic_rounding=precision == "bf16")
    config = run_of("tiny", TINY, 4, precision=precision, parallel=parallel, optim=optim)
    plan = plan_step(config)
    with closing(connect("cpu", parallel)) as world:
        task = build_task(config, world)
        step = build_step(config, world, task)
        step(torch.randn(4, 3, 16, 16), task.stand_ins(4, {4}, lambda tensors: tensors), 0)
        state = [value for values in step.optimizer.state.values() for value in values.values()]
        tensors = [*task.model.parameters(), *(p.grad for p in step.parameters), *state]
        assert plan.host == sum(local(tensor).numel() * tensor.itemsize for tensor in tensors)
    assert not {PARAMETERS, OPTIMIZER, "gradients"} & plan.memory.keys()


def test_average_and_evaluation_are_counted() -> None:
    config = run_of("tiny", {})
    plain, averaged = plan_step(config), plan_step(replace(config, ema_decay=0.9))
    assert averaged.memory.total() - plain.memory.total() == averaged.memory[AVERAGE] == 4 * plain.parameters
    config = replace(config, accumulation=16, held_out=0.1)
    few, many = (plan_step(replace(config, eval=EvalConfig(batch_size=size))) for size in (1, 8192))
    assert many.phase == "evaluation"
    assert many.memory.total() > few.memory.total()


def test_reduced_shards_replace_whole_gradients() -> None:
    options = {"vision": {"layers": 3}, "text": {"layers": 2, "vocab_size": 1000}}
    run = run_of(CLIP_B, options, 64, accumulation=4)
    whole, shards = (plan_step(replace(run, parallel=replace(SHARD, accumulate=how)), 8) for how in ("whole", "shards"))
    assert whole.memory[WHOLE_GRADIENTS] > shards.memory[WHOLE_GRADIENTS]
    assert 0.5 < (whole.memory.total() - shards.memory.total()) / (4 * 7 / 8 * whole.model_parameters) < 1
    assert shards.received["reduce-scatter"] == pytest.approx(4 * whole.received["reduce-scatter"], rel=0.1)


def test_teacher_is_whole_or_sharded() -> None:
    run = run_of(*STUDENT, 64, task=TASK, parallel=SHARD)
    shared = replace(run, task=replace(TASK, teacher=replace(TEACHER, shard=True)))
    whole, part = (plan_step(each, 4).memory[FROZEN] for each in (run, shared))
    assert whole / 4 < part < whole / 3


def test_casts_are_freed_after_autocast() -> None:
    """Recomputation saves no cast of a weight for the backward pass, and each block makes its casts anew."""
    run = run_of(CLIP_B, {"vision": {"layers": 8}, "text": {"layers": 2}}, 4, savings=BLOCK, precision="amp_bf16")
    few, whole = (plan_step(run, blocks=blocks) for blocks in (5, None))
    assert few.memory[CASTS] == whole.memory[CASTS]


def test_recorder_counts_a_storage_once() -> None:
    tracker = Recorder({}, "")
    tracker.mark("loss")
    with tracker:
        x = torch.ones(1000)
        view = x.view(10, 100)[2:]
        del x
        other = torch.ones(10)
        del view
    (phase,) = tracker.phases()[1]
    assert (phase.peak.total(), phase.change.total()) == (4040, other.nbytes)


@pytest.mark.exhaustive
def test_loss_workspace_equals_the_kernels() -> None:
    pytest.importorskip("triton")
    from evakernels.triton import contrastive

    if not contrastive.INTERPRETED:
        assert (recorder.CHUNK_BYTES, recorder.MIN_CHUNK) == (contrastive.CHUNK_BYTES, contrastive.MIN_CHUNK)


@pytest.mark.parametrize(
    ("changes", "gpus", "argument"),
    [
        ({"accumulation": 6}, 3, "batch_size"),
        ({"parallel": ParallelConfig(mode="hybrid", shard_size=3)}, 4, "shard_size"),
        ({}, 0, "gpus"),
    ],
)
def test_impossible_layout_is_refused(changes: dict[str, Any], gpus: int, argument: str) -> None:
    with pytest.raises(UserError, match=argument):
        plan_step(replace(run_of("tiny", {}), **changes), gpus)
