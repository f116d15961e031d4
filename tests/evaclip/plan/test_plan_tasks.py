"""Plans of fine-tuning and of masked image modelling: the published recipes by formula, and what differs from a CLIP's.

That they are what a real step holds and computes, the tests of CLIP's plans show for these tasks too.
"""

import json
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from evaclip.commands.main import main
from evaclip.plan.fit import largest
from evaclip.plan.gpus import get_gpu
from evaclip.plan.job import Job
from evaclip.plan.memory import plan_memory
from evaclip.plan.phases import WORKING
from evaclip.plan.recorder import FROZEN
from evaclip.plan.time import plan_time
from evaclip.train.as_gpus import pretended, traced_peak
from evaclip.train.config import ClassificationTask, MaskedImageTask, TeacherConfig
from evaclip.train.recipes import get_recipe

H100 = get_gpu("h100-80g")
SMALL = {"width": 64, "heads": 2, "layers": 2, "image_size": 56}
OPTIONS = f"model.options={json.dumps(SMALL)}"
TEACHER = TeacherConfig(name="EVA01-CLIP-g-14", options={"embed_dim": 64, "vision": {**SMALL, "layers": 3}})
TASK = MaskedImageTask(teacher=TEACHER, smallest_block=2)
STUDENT = Job(model="eva02_base_patch14_224", task=TASK, options=SMALL, gpus=4, global_batch=64)
CLASSIFIER = Job(model="eva02_base_patch14_448", task=ClassificationTask(classes=10), options=SMALL, global_batch=64)
MIXED = replace(CLASSIFIER, task=ClassificationTask(classes=10, cutmix=1.0), global_batch=26, gpus=3)
RECIPES = [
    ("finetune-eva02-b-in1k", 768, 12, 2048, 87_117_544),
    ("finetune-eva02-l-in1k", 1024, 24, 2730, 305_080_232),
    ("pretrain-mim-eva02-base", 768, 12, 2048, 86_546_944),
    ("pretrain-mim-eva02-large", 1024, 24, 2730, 304_319_424),
]


def operations(patches: int, width: int, blocks: int, mlp: int) -> tuple[int, int, int]:
    """Of patch embedding, of the blocks' products, and of attention: one forward pass of one picture."""
    tokens = patches + 1
    return 2 * patches * 588 * width, 2 * blocks * tokens * (4 * width**2 + mlp), 4 * blocks * tokens**2 * width


@pytest.mark.parametrize(("name", "width", "blocks", "hidden", "parameters"), RECIPES)
def test_the_recipes_by_formula(name: str, width: int, blocks: int, hidden: int, parameters: int) -> None:
    job = Job.of(get_recipe(name), 8)
    memory = plan_memory(job)
    time, samples, masks = plan_time(job, memory, H100), job.global_batch // 8, "mim" in name
    outputs, predicted, patches = (1024, 105, 256) if masks else (1000, 1, 1024)
    around = 589 * width + (patches + 2 + masks) * width + 2 * width + (width + 1) * outputs
    assert blocks * (4 * width**2 + 3 * width * hidden + 8 * width + 4 * hidden) + around == parameters
    assert memory.parameters == memory.model_parameters == parameters

    embedding, products, attention = operations(patches, width, blocks, 3 * width * hidden)
    forward = embedding + products + 2 * predicted * width * outputs
    expected = {
        "forward": {"products": samples * forward, "attention": samples * attention},
        # The pixels need no gradient; attention computes its scores once more.
        "backward": {"products": samples * (2 * forward - embedding), "attention": samples * 5 * attention // 2},
    }
    model = 3 * (forward + attention)
    if masks:
        embedding, products, attention = operations(patches, 1408, 40, 2 * 1408 * 6144)
        teacher = embedding + products + 2 * patches * 1408 * 1024
        expected["teacher"] = {"products": samples * teacher, "attention": samples * attention}
        model += teacher + attention
        assert memory.steps.start[FROZEN] == pytest.approx(2 * 1_011e6, rel=0.01)
    assert time.flops == expected
    assert time.model_flops == pytest.approx(samples * model, rel=1e-3)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [case[0] for case in RECIPES])
def test_the_recipes_hold_what_the_trainers_step_does(name: str) -> None:
    with closing(pretended("cpu", 8)) as world:
        traced = traced_peak(get_recipe(name), world).total()
    peak = plan_memory(Job.of(get_recipe(name), 8)).peak.total
    print(f"| {name} | {peak / 2**30:.2f} | {traced / 2**30:.2f} |")
    assert peak == pytest.approx(traced, rel=0.02)


def test_a_teacher_is_whole_or_cut_up() -> None:
    cut = replace(STUDENT, task=replace(TASK, teacher=replace(TEACHER, shard=True)))
    whole, part = (plan_memory(job).steps.start[FROZEN] for job in (STUDENT, cut))
    # Positions, one row, are in the first part.
    assert whole / 4 < part < whole / 3
    # One GPU has all that four would share out.
    assert plan_memory(replace(cut, gpus=1, mode="replicate")).steps.start[FROZEN] == whole
    half, single = (plan_memory(replace(STUDENT, precision=each)).steps.start[FROZEN] for each in ("bf16", "fp32"))
    assert single == pytest.approx(2 * half, rel=0.1)


def test_an_evaluation_by_the_loss_has_the_teacher_too() -> None:
    wide = replace(TEACHER, options={"embed_dim": 64, "vision": {**SMALL, "width": 256}})
    jobs = [replace(STUDENT, evaluated=4096, task=replace(TASK, teacher=teacher)) for teacher in (TEACHER, wide)]
    narrow, large = (plan_memory(job).peak for job in jobs)
    assert narrow.phase == large.phase == "evaluation"
    assert large.bytes[WORKING] > 3 * narrow.bytes[WORKING]


def test_offload_leaves_none_of_an_image_model_on_the_gpu() -> None:
    memory = plan_memory(replace(CLASSIFIER, mode="shard", offload="cpu", averaged=True))
    assert memory.host == 20 * memory.model_parameters


def test_pairs_that_are_mixed_are_not_parted() -> None:
    assert (MIXED.local_batch, replace(MIXED, accumulation=4).chunk) == (10, 4)
    assert CLASSIFIER.together == 1


@pytest.mark.exhaustive
def test_the_largest_batch_is_of_whole_pairs() -> None:
    found = largest(MIXED, replace(H100, memory_gib=0.2 + H100.beside_gib[1]))
    assert found.job.chunk > 16
    assert found.job.global_batch == 3 * found.job.chunk
    assert found.job.chunk % 2 == 0


def test_tables_have_what_there_is(plan: Any) -> None:
    given = ["--gpus", "2", "--set", OPTIONS, "batch_size=64", "schedule.epoch_samples=6400"]
    text = plan("finetune-eva02-b-in1k", *given, "--savings")
    assert "16 of 16 patches" in text
    assert "GPU-hours for 192,000 samples" in text
    assert not [word for word in ("caption", "the text", "teacher", "pooled") if word in text]
    teacher = f"task.teacher.options={json.dumps(TEACHER.options)}"
    tree = json.loads(plan("pretrain-mim-eva02-base", *given, teacher, "task.smallest_block=2", "--json"))
    assert tree["memory"]["kinds"][FROZEN] > 0
    assert tree["time"]["seconds"]["teacher"][0] > tree["time"]["seconds"]["teacher"][1] > 0
    assert tree["host"]["checkpoint"] == 12 * tree["memory"]["model_parameters"]


def test_parts_of_other_image_sizes(plan: Any) -> None:
    sizes = "schedule.resolutions=[{image_size: 28, share: 0.5}]"
    given = ["finetune-eva02-b-in1k", "--set", OPTIONS, "schedule.epoch_samples=2048", sizes, "--json"]
    parts = json.loads(plan(*given))["parts"]
    assert [(part["image_size"], part["steps"]) for part in parts] == [(28, 30), (56, 30)]
    assert parts[0]["flops"] < 0.4 * parts[1]["flops"]


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [
        ("finetune-eva02-b-in1k", ["--set", "task.classes=null"], "task.classes is not set"),
        ("finetune-eva02-b-in1k", ["--caption-tokens", "15"], "task.name=classification has no captions"),
        ("finetune-eva02-b-in1k", ["--set", "task.mixup=1", "batch_size=33"], "no multiple of 2"),
        ("pretrain-mim-eva02-base", ["--set", "task.teacher.shard=true"], "needs parallel.mode=shard or hybrid"),
        ("pretrain-mim-eva02-base", ["--set", "model.name=EVA02-CLIP-B-16"], "unknown vision model"),
    ],
)
def test_what_the_run_refuses(recipe: str, given: list[str], message: str, capsys: Any) -> None:
    assert main(["plan", recipe, *given]) == 2
    assert message in capsys.readouterr().err
