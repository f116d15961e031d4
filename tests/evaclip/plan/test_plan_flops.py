"""Planned FLOPs are those that torch counts in a real step, and the published recipes' by formula."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from test_plan_memory import BLOCK, CLIP_E, SHARD, run_of
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from evaclip import Savings
from evaclip.data import Batch
from evaclip.plan.recorder import FLOPS
from evaclip.plan.step import plan_step
from evaclip.train.build import build_step, build_task
from evaclip.train.config import ClassificationTask, MaskedImageTask, TeacherConfig, TrainConfig
from evaclip.train.distributed import World
from evaclip.train.recipes import get_recipe

SMALL = {
    "vision": {"width": 64, "heads": 4, "layers": 2, "image_size": 64},
    "text": {"width": 64, "heads": 4, "layers": 2, "vocab_size": 600},
}
IMAGE = {**SMALL["vision"], "image_size": 56}
TEACHER = TeacherConfig(name="EVA01-CLIP-g-14", options={"vision": {"width": 32, "heads": 2, "layers": 3}})
TASK = MaskedImageTask(teacher=TEACHER, smallest_block=2)
CLASSES = ClassificationTask(classes=10, mixup=0.8)
COUNTED = {
    "B": run_of("EVA02-CLIP-B-16", SMALL, 2, dropout=0.5, savings=BLOCK),
    "E": run_of(CLIP_E, {**SMALL, "vision": IMAGE}, 2, savings=Savings(recompute="activations")),
    "classifier": run_of("eva02_base_patch14_448", IMAGE, 2, dropout=0.5, task=CLASSES),
    "student": run_of("eva02_base_patch14_224", IMAGE, 2, task=TASK, savings=BLOCK),
}


def count(config: TrainConfig) -> int:
    """FLOPs of a real step. Captions are as long as possible: attention is counted exactly for equal lengths."""
    world = World(torch.device("cpu"))
    task: Any = build_task(config, world)
    task.mean_caption_tokens = 77
    step = build_step(config, world, task)
    targets = task.stand_ins(2, {2}, lambda tensors: tensors)
    # The formulas take tensors; the counter passes shapes to those that aren't marked.
    raw = {op: partial(formula) for op, formula in FLOPS.items() if op not in flop_registry}
    for formula in raw.values():
        formula._get_raw = True  # type: ignore[attr-defined]
    with FlopCounterMode(display=False, custom_mapping=raw) as counter:
        step(Batch([torch.randn(2, 3, *task.visual.config.image_shape)], targets), 0)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name == "E" else name for name in COUNTED]
)
def test_flops_equal_real_step(name: str) -> None:
    config = COUNTED[name]
    plan = plan_step(config, caption_tokens=None if config.task.name != "contrastive" else 77)
    assert sum(plan.flops.values()) == count(config)
    assert ("recomputation" in plan.flops) == (config.model.savings.recompute != "none")
    assert ("teacher" in plan.flops) == (name == "student")


@pytest.mark.parametrize("name", ["B", "student"])
def test_micro_batches_repeat_forward_pass(name: str) -> None:
    """Those of pairs twice, those of a mean over samples once; the backward pass is as long in any case."""
    run = replace(COUNTED[name], batch_size=96)
    words = 77 if name == "B" else None
    whole, cut = (
        plan_step(replace(run, accumulation_steps=number), 2, caption_tokens=words).flops for number in (1, 4)
    )
    assert whole.keys() == cut.keys()
    for stage, flops in cut.items():
        times = 2 if (name, stage) == ("B", "forward") else 1
        # The teacher's positions are resized once a micro-batch.
        assert flops == pytest.approx(times * whole[stage], rel=0.02)


@pytest.mark.parametrize(("reshard", "gathers"), [(True, 2), (False, 1)])
def test_sharding_communicates_each_parameter(reshard: bool, gathers: int) -> None:
    run = run_of(
        "EVA02-CLIP-B-16", SMALL, 8, precision="amp_bf16", parallel=replace(SHARD, reshard_after_forward=reshard)
    )
    plan = plan_step(run, 8)
    # Padding makes every shard as large as the first rank's; features and scalars are small.
    assert plan.received["all-gather"] == pytest.approx(7 * gathers * 2 * plan.parameters, rel=0.04)
    assert plan.received["reduce-scatter"] == pytest.approx(7 * 4 * plan.parameters, rel=0.04)


def test_replicas_reduce_each_gradient() -> None:
    plan = plan_step(run_of("EVA02-CLIP-B-16", SMALL, 32), 8)
    assert plan.received["all-reduce"] == pytest.approx(7 / 8 * 2 * 4 * plan.parameters, rel=1e-3)


RECIPES = [
    ("finetune-eva02-l-in1k", 1024, 24, 2730, 305_080_232),
    pytest.param("pretrain-mim-eva02-base", 768, 12, 2048, 86_546_944, marks=pytest.mark.exhaustive),
]


def flops_of_image(patches: int, width: int, blocks: int, mlp: int) -> tuple[int, int]:
    """Of the patch embedding's GEMM and of the blocks, in one forward pass of one image."""
    tokens = patches + 1
    gemms = 2 * blocks * tokens * (4 * width**2 + mlp)
    return 2 * patches * 588 * width, gemms + 4 * blocks * tokens**2 * width


@pytest.mark.parametrize(("name", "width", "blocks", "hidden", "parameters"), RECIPES)
def test_recipes_equal_formula(name: str, width: int, blocks: int, hidden: int, parameters: int) -> None:
    plan = plan_step(get_recipe(name), 8)
    masks, samples = "mim" in name, plan.local_batch
    outputs, predicted, patches = (1024, 105, 256) if masks else (1000, 1, 1024)
    assert plan.parameters == plan.model_parameters == parameters
    embedding, body = flops_of_image(patches, width, blocks, 3 * width * hidden)
    forward = embedding + body + 2 * predicted * width * outputs
    attention = 4 * blocks * (patches + 1) ** 2 * width
    # The pixels need no gradient; the backward pass of attention has 5 GEMMs to 2.
    backward = 2 * forward - embedding + attention // 2
    expected = {"forward": samples * forward, "backward": samples * backward}
    if masks:
        embedding, body = flops_of_image(patches, 1408, 40, 2 * 1408 * 6144)
        expected["teacher"] = samples * (embedding + body + 2 * patches * 1408 * 1024)
    assert plan.flops == expected
