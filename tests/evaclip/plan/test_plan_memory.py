"""The planned memory is that of real steps, and that of a deep model follows from a shallow one."""

import gc
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from measured import batch_of, highest, peak_of_sharded_step, peak_of_step
from processes import in_processes
from sharded_peak import write_peaks
from torch.distributed.tensor import DTensor

from evaclip import Savings, TextConfig
from evaclip.data.config import DataConfig
from evaclip.errors import UserError
from evaclip.plan import loss
from evaclip.plan.job import Job
from evaclip.plan.memory import OPTIMIZER, plan_memory
from evaclip.plan.recorder import GRADIENTS, PARAMETERS, Recorder, local
from evaclip.plan.tasks import caption_lengths, caption_tokens
from evaclip.train.build import build_step, build_task
from evaclip.train.config import (
    ClassificationTask,
    MaskedImageTask,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Precision,
    ScheduleConfig,
    TeacherConfig,
    TrainConfig,
)
from evaclip.train.distributed import connect
from evaclip.train.recipes import get_recipe


def few_of(cases: dict[str, Any], *quick: str) -> list[Any]:
    """The names of all cases as parameters, of which those other than `quick` are exhaustive."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.exhaustive) for name in cases]


B = {"vision": {"width": 384, "heads": 6, "layers": 7}, "text": {"width": 256, "heads": 4, "layers": 6}}
E = {
    "vision": {"width": 256, "heads": 4, "layers": 7, "mlp_ratio": 6.0},
    "text": {"width": 256, "heads": 4, "layers": 6},
}
# A CPU casts a gradient before it adds it to one of another dtype; a GPU does not.
FEW_WORDS = {**B, "text": {**B["text"], "vocab_size": 1000}}
NARROW = {"vision": {"width": 192, "heads": 3, "layers": 7}, "text": {"width": 128, "heads": 2, "layers": 6}}
ONE = {"gpus": 1, "global_batch": 16, "mode": "replicate"}
IMAGE = {"width": 192, "heads": 3, "layers": 7, "image_size": 112, "drop_path": 0.1}
TEACHER = TeacherConfig(name="EVA01-CLIP-g-14", options={"vision": {"width": 256, "layers": 8}, "embed_dim": 256})
CLASSIFIER = {"model": "eva02_base_patch14_448", "task": ClassificationTask(classes=1000), "options": IMAGE}
MIXED = ClassificationTask(classes=10, mixup=0.8, mix_mode="elem")
TASK = MaskedImageTask(teacher=TEACHER, smallest_block=4)
STUDENT = {"model": "eva02_base_patch14_224", "task": TASK, "options": IMAGE}
FOUR = {"gpus": 4, "global_batch": 64, "mode": "shard"}
FP32 = {"precision": "fp32"}
CLIP_B = {"model": "EVA02-CLIP-B-16", "options": B}
CLIP_E = {"model": "EVA02-CLIP-bigE-14", "options": E}
STEPS: dict[str, dict[str, Any]] = {
    "B-narrow": {**CLIP_B, **FP32, "options": NARROW},
    "B": {**CLIP_B, **FP32},
    "B-amp-padded": {**CLIP_B, "savings": Savings(pack_text=False)},
    "B-activations": {**CLIP_B, "token_dropout": 0.5, "savings": Savings(recompute="activations")},
    "B-bf16": {**CLIP_B, "precision": "bf16", "savings": Savings(recompute="block")},
    "B-bf16-chunks": {**CLIP_B, "precision": "bf16", "accumulation": 2, "options": FEW_WORDS},
    "E-block": {**CLIP_E, "token_dropout": 0.5, "savings": Savings(recompute="block")},
    "E-activations": {**CLIP_E, "savings": Savings(recompute="activations")},
    "E-chunks": {**CLIP_E, **FP32, "accumulation": 2, "optimizer": "adamw"},
    "classifier": {**CLASSIFIER, **FP32},
    "classifier-token": {**CLASSIFIER, **FP32, "model": "eva02_base_patch16_clip_224", "token_dropout": 0.5},
    "classifier-mixed": {**CLASSIFIER, **FP32, "task": MIXED, "accumulation": 3},
    "classifier-four": {**CLASSIFIER, **FOUR, "accumulation": 2, "savings": Savings(recompute="activations")},
    "student": {**STUDENT, **FP32},
    "student-chunks": {**STUDENT, "accumulation": 2, "savings": Savings(recompute="block")},
    "student-drop": {**STUDENT, **FP32, "task": replace(TASK, masked="drop", decoder_layers=2)},
    "student-four": {**STUDENT, **FP32, **FOUR, "task": replace(TASK, teacher=replace(TEACHER, shard=True))},
}


def _skip_without_bfloat16(job: Job) -> None:
    """A step of 16 bits takes minutes where the CPU has no instructions for it; its bytes are the same everywhere."""
    if job.precision != "fp32" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no instructions for bfloat16, and torch needs minutes for a step")


@pytest.mark.slow
@pytest.mark.parametrize("name", few_of(STEPS, "B-narrow", "E-block", "classifier", "student"))
def test_peak_of_a_real_step(name: str) -> None:
    job = Job(**{**ONE, **STEPS[name]})
    _skip_without_bfloat16(job)
    _compare(name, plan_memory(job).peak.total, peak_of_step(job), 0.02)


SHARDED: dict[str, dict[str, Any]] = {
    "block": {"gpus": 2, "token_dropout": 0.5, "savings": Savings(recompute="block")},
    "keep": {"gpus": 2, "reshard": False},
    "fp32": {"gpus": 2, "precision": "fp32", "savings": Savings(recompute="activations")},
    "four": {"gpus": 4, "savings": Savings(recompute="block")},
    "hybrid": {"gpus": 4, "mode": "hybrid", "shard_size": 2, "savings": Savings(recompute="block")},
    "many": {"gpus": 144, "savings": Savings(recompute="block")},
    "many-hybrid": {"gpus": 144, "mode": "hybrid", "shard_size": 8, "savings": Savings(recompute="activations")},
}


def _sharded_job(name: str, **layers: int) -> Job:
    case = SHARDED[name]
    # Few words: what a CPU's operators allocate inside themselves for a large embedding isn't there on a GPU.
    options = {"vision": {**E["vision"], **layers}, "text": {**E["text"], "vocab_size": 1000, **layers}}
    return Job(model="EVA02-CLIP-bigE-14", options=options, global_batch=16 * case["gpus"], **case)


def _planned(job: Job) -> int:
    peaks = [moment.total - moment.bytes[OPTIMIZER] - moment.bytes["loss"] for moment in plan_memory(job).moments]
    return max(peaks)


@pytest.mark.slow
@pytest.mark.parametrize("name", few_of(SHARDED, "block"))
def test_peak_of_a_real_sharded_step(name: str) -> None:
    job = _sharded_job(name)
    _skip_without_bfloat16(job)
    _compare(name, _planned(job), peak_of_sharded_step(job), 0.02)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("processes", [2, 4])
def test_peak_of_real_processes(processes: int, tmp_path: Path) -> None:
    names = [name for name in SHARDED if SHARDED[name]["gpus"] == processes]
    jobs = [_sharded_job(name, layers=3) for name in names]
    for job in jobs:
        _skip_without_bfloat16(job)
    in_processes(processes, write_peaks, jobs, tmp_path / "peaks.json")
    peaks = json.loads((tmp_path / "peaks.json").read_text())
    for name, job, measured in zip(names, jobs, peaks, strict=True):
        _compare(f"{name}, gloo", _planned(job), measured, 0.05)


def _compare(name: str, planned: int, measured: int, tolerance: float) -> None:
    print(f"| {name} | {planned / 1e6:,.1f} MB | {measured / 1e6:,.1f} MB | {planned / measured:.4f} |")
    assert planned == pytest.approx(measured, rel=tolerance)


def test_what_an_earlier_measurement_left_is_not_counted() -> None:
    """Such as a sharded model: its parts refer to each other, and it waits with its gradients to be collected."""

    def allocate() -> None:
        left = [torch.ones(1 << 20)]
        left.append(left)  # type: ignore[arg-type]

    gc.disable()
    try:
        assert highest(allocate) == 4 << 20
        assert highest(lambda: (gc.collect(), torch.ones(1 << 18))) == 1 << 20
    finally:
        gc.enable()


DEEP: dict[str, dict[str, Any]] = {
    "shard": {"savings": Savings(recompute="block")},
    "keep": {"reshard": False, "savings": Savings(recompute="activations")},
    "hybrid": {"mode": "hybrid", "shard_size": 8},
    "replicate": {"mode": "replicate", "savings": Savings(recompute="block")},
    "replicate-none": {"mode": "replicate", "token_dropout": 0.5},
    "chunks": {"accumulation": 4, "savings": Savings(recompute="block")},
    "fp32": {"precision": "fp32", "mode": "replicate", "accumulation": 2},
    "classifier": {**CLASSIFIER, "accumulation": 2, "mode": "replicate"},
    "student": {**STUDENT, "savings": Savings(recompute="block")},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", DEEP)
def test_five_blocks_tell_of_nine(name: str) -> None:
    model = ("EVA02-CLIP-L-14", "EVA02-CLIP-bigE-14")[list(DEEP).index(name) % 2]
    job = Job(**{"model": model, "gpus": 16, "global_batch": 16 * 64, **DEEP[name]})
    texts = {"text": {"layers": 8}} if job.has_texts else {}
    job = replace(job, options={**job.with_vision(layers=9), **texts})
    few, all_of_them = plan_memory(job), plan_memory(job, blocks=9)
    assert few.parameters == all_of_them.parameters
    assert [moment.phase for moment in few.moments] == [moment.phase for moment in all_of_them.moments]
    for one, other in zip(few.moments, all_of_them.moments, strict=True):
        assert one.total == pytest.approx(other.total, rel=2e-3), one.phase


def test_the_5b_model_is_planned_whole() -> None:
    job = Job.of(get_recipe("eva02-e-14-plus"), gpus=1, global_batch=8, mode="replicate")
    memory = plan_memory(job)
    assert memory.parameters == memory.model_parameters == 5_044_889_089
    assert memory.steps.start[PARAMETERS] == 4 * 5_044_889_089
    assert memory.steps.start[OPTIMIZER] == 8 * 5_044_889_089
    assert memory.moments[-1].bytes[GRADIENTS] == pytest.approx(4 * 5_044_889_089, rel=1e-4)


def test_state_in_16_bits_is_half() -> None:
    job = Job(model="tiny", **ONE)
    fp32, bf16 = (plan_memory(replace(job, state_dtype=dtype)) for dtype in ("fp32", "bf16"))
    assert fp32.peak.bytes[OPTIMIZER] == 2 * bf16.peak.bytes[OPTIMIZER] > 0


@pytest.mark.parametrize(("precision", "optimizer"), [("amp_bf16", "adamw"), ("bf16", "lamb")])
def test_what_lies_in_host_memory_is_what_a_real_step_leaves(precision: Precision, optimizer: str) -> None:
    """All of it under offload; in bfloat16 parameters and gradients are half as large, and there are no copies."""
    world = connect("cpu", ParallelConfig(mode="shard", offload="cpu"))
    with closing(world):
        options = {"embed_dim": 16, "vision": {"width": 16, "layers": 2, "heads": 2, "image_size": 16, "patch_size": 4}}
        job = Job(
            model="tiny", global_batch=4, precision=precision, optimizer=optimizer, offload="cpu", options=options
        )
        config = TrainConfig(
            name="host", batch_size=4, data=DataConfig(), schedule=ScheduleConfig(steps=1), precision=precision,
            parallel=ParallelConfig(mode="shard", offload="cpu"), model=ModelConfig(name="tiny", options=options),
            optim=OptimConfig(name=optimizer, stochastic_rounding=precision == "bf16"),
        )  # fmt: skip
        task = build_task(config, world)
        step = build_step(config, world, task)
        step(*batch_of(job), 0)
        model, adam = task.model, step.optimizer
        on_the_host = [p for p in model.parameters() if isinstance(p, DTensor)]
        tensors = [t for p in on_the_host for t in (p, p.grad, adam.state[p]["exp_avg"], adam.state[p]["exp_avg_sq"])]
        measured = sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)
    assert plan_memory(job).host == measured


@pytest.mark.exhaustive
@pytest.mark.parametrize("accumulation", [1, 2])
def test_offload_takes_states_off_the_gpu(accumulation: int) -> None:
    job = Job.of(get_recipe("eva02-e-14-plus"), gpus=1, global_batch=8, mode="shard", accumulation=accumulation)
    # Three blocks stand for all well enough: what is compared is large.
    kept, offloaded = (plan_memory(replace(job, offload=offload), blocks=3) for offload in ("none", "cpu"))
    assert offloaded.host == 16 * (5_044_889_089 - 1)
    assert kept.host == 0
    # Chunks are added up in whole gradients, which stay.
    assert offloaded.peak.total < (0.2 if accumulation == 1 else 0.4) * kept.peak.total
    for before, after in zip(kept.moments, offloaded.moments, strict=True):
        assert not after.bytes.keys() & {PARAMETERS, OPTIMIZER, GRADIENTS}
        gone = sum(before.bytes[kind] for kind in (PARAMETERS, OPTIMIZER, GRADIENTS))
        assert after.total <= before.total - gone + 2 * 4 * 200e6


def test_averages_and_evaluations_are_counted() -> None:
    job = Job(model="tiny", **ONE)
    plain, averaged = (plan_memory(replace(job, averaged=on)) for on in (False, True))
    assert averaged.peak.total - plain.peak.total == 4 * plain.parameters
    # One of thousands of pictures takes more than a step of sixteen that is computed in chunks.
    evaluated = plan_memory(replace(job, accumulation=16, evaluated=8192))
    assert evaluated.peak.phase == "evaluation"
    assert evaluated.peak.total > plan_memory(replace(job, accumulation=16, evaluated=1)).peak.total


def test_chunks_that_add_up_shards_hold_no_whole_gradients() -> None:
    options = {"vision": {"layers": 3}, "text": {"layers": 2, "vocab_size": 1000}}
    job = Job(model="EVA02-CLIP-B-16", options=options, gpus=8, global_batch=64, accumulation=4)
    whole, shards = (plan_memory(replace(job, accumulate=way)) for way in ("whole", "shards"))
    # Of seven eighths of the gradients, in float32, only those of the blocks that are just computed stay.
    assert 0.5 < (whole.peak.total - shards.peak.total) / (4 * 7 / 8 * whole.model_parameters) < 1


def test_a_storage_counts_once_until_nothing_refers_to_it() -> None:
    recorder = Recorder()
    with recorder:
        x = torch.ones(1000)
        view = x.view(10, 100)[2:]
        assert sum(change for _, change in recorder.recording.changes) == 4000
        del x
        assert sum(change for _, change in recorder.recording.changes) == 4000
        view.untyped_storage().resize_(400)
        assert sum(change for _, change in recorder.recording.changes) == 400
        del view
        assert sum(change for _, change in recorder.recording.changes) == 0


@pytest.mark.parametrize(("count", "mean"), [(1, 15), (2, 46), (100, 15), (1000, 77), (64, 3)])
def test_captions_have_the_mean_length(count: int, mean: int) -> None:
    lengths = caption_lengths(count, mean, 77)
    assert len(lengths) == count
    assert sum(lengths) == pytest.approx(count * mean, abs=count)
    assert all(2 <= length <= 77 for length in lengths)
    ends = caption_tokens(lengths, TextConfig()).argmax(1) + 1
    assert ends.tolist() == lengths


@pytest.mark.exhaustive
def test_the_loss_is_planned_for_the_kernels_there_are() -> None:
    pytest.importorskip("triton")
    from evakernels.triton import contrastive

    if not contrastive.INTERPRETED:
        assert (loss.CHUNK_BYTES, loss.MIN_CHUNK) == (contrastive.CHUNK_BYTES, contrastive.MIN_CHUNK)


def test_the_loss_is_planned_in_chunks() -> None:
    job = Job(model="EVA02-CLIP-B-16", gpus=64, global_batch=131_072)
    texts, logits = 131_072 * 512 * 4, 2048 * 131_072 * 4
    assert loss.loss_bytes(job)["loss"] == pytest.approx(3 * texts + logits, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 3, "global_batch": 16, "accumulation": 6}, "less than one sample for each of 18 chunks"),
        ({"gpus": 4, "global_batch": 16, "mode": "hybrid", "shard_size": 3}, "doesn't divide 4 GPUs"),
        ({"caption_tokens": 78}, "expected 2 to 77"),
        ({"gpus": 0}, "expected at least 1"),
    ],
)
def test_jobs_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Job(model="EVA02-CLIP-B-16", **options)
