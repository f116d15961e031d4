"""Planned memory is that of real steps, and a few blocks stand for all."""

import gc
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from evaclip import Savings
from evaclip.data import Batch
from evaclip.data.config import DataConfig
from evaclip.errors import UserError
from evaclip.plan.recorder import AVERAGE, OPTIMIZER, PARAMETERS, WHOLE_GRADIENTS, local
from evaclip.plan.step import plan_step
from evaclip.train.build import build_step, build_task, shards_parameters
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
from evaclip.train.distributed import World, connect, fake_ranks
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
    "E-micro-batches": (run_of(CLIP_E, E, accumulation_steps=2), 1),
    "E-block-one-of-144": (run_of(CLIP_E, E, 16 * 144, dropout=0.5, savings=BLOCK, parallel=SHARD), 144),
    "classifier-mixed": (run_of(*CLASSIFIER, task=replace(MIXED), accumulation_steps=2), 1),
    "classifier-one-of-4": (
        run_of(*CLASSIFIER, 64, task=ClassificationTask(classes=1000), accumulation_steps=2, parallel=SHARD), 4,
    ),
    "student-bf16": (run_of(*STUDENT, task=TASK, precision="amp_bf16", savings=BLOCK), 1),
    "student-one-of-4": (
        run_of(*STUDENT, 64, task=replace(TASK, teacher=replace(TEACHER, shard=True)), parallel=SHARD), 4,
    ),
}  # fmt: skip
QUICK = {"B": (), "E-block-one-of-144": pytest.mark.by_processor, "classifier-mixed": ()}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=QUICK.get(name, pytest.mark.exhaustive)) for name in STEPS])
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
    "keep": run_of(
        L, NINE, 16 * 64, savings=ACTIVATIONS, parallel=ParallelConfig(mode="shard", reshard_after_forward=False)
    ),
    "replicate-amp": run_of(BIG_E, NINE, 16 * 64, savings=BLOCK, precision="amp_bf16"),
    "micro-batches": run_of(L, NINE, 16 * 64, accumulation_steps=2, parallel=SHARD, precision="amp_bf16"),
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
        step(Batch([torch.randn(4, 3, 16, 16)], task.stand_ins(4, {4}, lambda tensors: tensors)), 0)
        state = [value for values in step.optimizer.state.values() for value in values.values()]
        tensors = [*task.model.parameters(), *(p.grad for p in step.parameters), *state]
        assert plan.host == sum(local(tensor).numel() * tensor.itemsize for tensor in tensors)
    assert not {PARAMETERS, OPTIMIZER, "gradients"} & plan.memory.keys()


def test_plan_counts_average_and_evaluation() -> None:
    config = run_of("tiny", {})
    plain, averaged = plan_step(config), plan_step(replace(config, ema_decay=0.9))
    assert averaged.memory.total() - plain.memory.total() == averaged.memory[AVERAGE] == 4 * plain.parameters
    config = replace(config, accumulation_steps=16, validation_split=0.1)
    few, many = (plan_step(replace(config, eval=EvalConfig(batch_size=size))) for size in (1, 8192))
    assert many.phase == "evaluation"
    assert many.memory.total() > few.memory.total()


def test_recomputation_saves_memory() -> None:
    runs = [run_of("tiny", {}, 64, savings=Savings(recompute=how)) for how in ("none", "activations", "block")]
    everything, activations, block = (plan_step(run).memory.total() for run in runs)
    assert block < activations < everything


def test_reduced_shards_replace_whole_gradients() -> None:
    options = {"vision": {"layers": 3}, "text": {"layers": 2, "vocab_size": 1000}}
    run = run_of(CLIP_B, options, 64, accumulation_steps=4)
    whole, shards = (plan_step(replace(run, parallel=replace(SHARD, accumulate=how)), 8) for how in ("whole", "shards"))
    assert whole.memory[WHOLE_GRADIENTS] > shards.memory[WHOLE_GRADIENTS]
    assert 0.5 < (whole.memory.total() - shards.memory.total()) / (4 * 7 / 8 * whole.model_parameters) < 1
    assert shards.received["reduce-scatter"] == pytest.approx(4 * whole.received["reduce-scatter"], rel=0.1)


def test_impossible_layout_is_refused() -> None:
    hybrid = run_of("tiny", {}, parallel=ParallelConfig(mode="hybrid", shard_size=3))
    native = replace(run_of("tiny", {}), data=DataConfig(resize="native"))
    for run, gpus, argument in (
        (run_of("tiny", {}, accumulation_steps=6), 3, "batch_size"),
        (hybrid, 4, "shard_size"),
        (native, 1, "data.resize"),
    ):
        with pytest.raises(UserError, match=argument):
            plan_step(run, gpus)


def peak_of_step(config: TrainConfig, gpus: int) -> int:
    """Peak bytes of the second step of rank 0 of `gpus`, of everything that the run has allocated."""
    world = nullcontext(World(torch.device("cpu"))) if gpus == 1 else closing(fake_ranks("cpu", gpus))
    with world as ranks:
        task = build_task(config, ranks)
        step = build_step(config, ranks, task)
        rows = config.batch_size // gpus
        micro = -(-rows // config.accumulation_steps)
        targets = task.stand_ins(rows, {micro, rows // config.accumulation_steps}, lambda tensors: tensors)
        images = torch.randn(rows, 3, *task.visual.config.image_shape)
        step(Batch([images], targets), 0)
        step.optimizer.zero_grad()
        # Images and targets are in host memory, except those of a micro-batch.
        known = [*task.model.parameters(), *task.model.buffers(), *task.extra_tensors()]
        known += [images[:micro].clone(), targets[:micro].clone()]
        known += [value for state in step.optimizer.state.values() for value in state.values()]
        held = sum(local(value).untyped_storage().nbytes() for value in known)
        assert shards_parameters(config, ranks) == (gpus > 1)
        return held + peak_of(lambda: step(Batch([images], targets), 1))


# CPU kernels of these ops allocate workspaces that GPU kernels don't, such as the float32 result of a bfloat16 matmul,
# or oneDNN's copy of a transposed matrix.
WITH_WORKSPACE = {
    *("aten::convolution", "aten::convolution_backward", "aten::mm", "aten::addmm", "aten::bmm"),
    "mkldnn::_linear_pointwise",
}


def peak_of(run: Any) -> int:
    """Peak bytes that `run()` allocates on top of those before it."""
    # Memory of an earlier call that is freed in this one would count as negative.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    total = peak = op_ends = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.start_ns() >= op_ends:
            peak = max(peak, total)
        if event.name() in WITH_WORKSPACE:
            op_ends = max(op_ends, event.end_ns())
        if event.name() == "[memory]":
            total += event.nbytes()
    return peak
