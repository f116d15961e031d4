"""Operations are those that torch counts in a real step; time follows from them by the roofline."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from measured import rows_of
from torch.utils.flop_counter import FlopCounterMode

from evaclip import Savings, create_model
from evaclip.model.flops import flops_per_sample
from evaclip.plan.gpus import get_gpu
from evaclip.plan.job import Job
from evaclip.plan.loss import loss_bytes, loss_costs
from evaclip.plan.memory import plan_memory
from evaclip.plan.operators import Cost
from evaclip.plan.time import Assumptions, plan_time, seconds_of, seconds_of_collective
from evaclip.train.build import build_task
from evaclip.train.config import ClassificationTask, MaskedImageTask, TeacherConfig
from evaclip.train.distributed import World
from evaclip.train.recipes import get_recipe
from evaclip.train.step import Chunk
from evakernels import sample_token_index
from evakernels.reference import contrastive

A100 = get_gpu("a100-80g")
FULL = Assumptions(products=(1, 1), attention=(1, 1), memory=(1, 1), links=(1, 1), overlap=(0, 1))
SMALL = {
    "vision": {"width": 64, "heads": 4, "layers": 7, "image_size": 64},
    "text": {"width": 64, "heads": 4, "layers": 6, "vocab_size": 600},
}
IMAGE = {**SMALL["vision"], "image_size": 56}
STUDENT = MaskedImageTask(
    teacher=TeacherConfig(name="EVA01-CLIP-g-14", options={"vision": {"width": 32, "heads": 2, "layers": 3}}),
    smallest_block=2,
)
CLIP = {"options": SMALL, "token_dropout": 0.5, "caption_tokens": 77}
CLASSIFIER = {"task": ClassificationTask(classes=10, mixup=0.8), "options": IMAGE, "token_dropout": 0.5}
DROPPING = replace(STUDENT, masked="drop", decoder_layers=2)
COUNTED_JOBS: dict[str, dict[str, Any]] = {
    "B": {"model": "EVA02-CLIP-B-16", **CLIP},
    "E": {"model": "EVA02-CLIP-bigE-14", **CLIP, "options": {**SMALL, "vision": IMAGE}},
    "classifier": {"model": "eva02_base_patch14_448", **CLASSIFIER},
    "student": {"model": "eva02_base_patch14_224", "task": STUDENT, "options": IMAGE},
    "student-drop": {"model": "eva02_tiny_patch14_224", "task": DROPPING, "options": IMAGE},
}


def planned(job):
    return plan_time(job, plan_memory(job), A100)


def _attention(batch: int, heads: int, queries: int, keys: int, channels: int) -> int:
    return 4 * batch * heads * queries * keys * channels


def _rope(q: Any, k: Any, *_: Any, **__: Any) -> int:
    return _attention(q[0], q[2], q[1], k[1], q[3])


def _packed(q: Any, k: Any, v: Any, cu_seqlens: Any, *_: Any, **__: Any) -> int:
    captions = cu_seqlens[0] - 1
    return captions * _attention(1, q[1], q[0] // captions, q[0] // captions, q[2])


def _sdpa(q: Any, k: Any, *_: Any, **__: Any) -> int:
    return _attention(q[0], q[1], q[2], k[2], q[3])


def _backward(forward: Any) -> Any:
    return lambda dout, *rest, **kwargs: 5 * forward(*rest, **kwargs) // 2


def _packed_backward(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, cu_seqlens: Any, *_: Any, **__: Any) -> int:
    return 5 * _packed(q, k, v, cu_seqlens) // 2


ops, aten = torch.ops.evakernels, torch.ops.aten
COUNTED = {
    ops.rope_attention_forward: _rope,
    ops.rope_attention_backward: _backward(_rope),
    ops.packed_attention_forward: _packed,
    ops.packed_attention_backward: _packed_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward(_sdpa),
}


def _counted(job: Job) -> int:
    """Of a real forward and backward pass."""
    task: Any = build_task(job.run, World(torch.device("cpu")))
    (images, targets), index = rows_of(job, task), _index(job)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        if job.has_texts:
            results = task.model(images, targets, token_index=index)[:2]
        else:
            results = (task.of_samples(images, Chunk(slice(0, 2), targets, index, 0, 0))["loss"],)
        torch.autograd.backward(results, [torch.ones_like(value) for value in results])
    return counter.get_total_flops()


def _index(job: Job) -> torch.Tensor | None:
    patches = job.vision.num_patches
    kept = int(patches * (1 - job.token_dropout))
    return sample_token_index(job.chunk, patches, kept) if job.token_dropout else None


@pytest.mark.parametrize(
    "recompute", [*(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("none", "activations")), "block"]
)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name == "E" else name for name in COUNTED_JOBS]
)
def test_operations_are_those_that_torch_counts(name: str, recompute: Any) -> None:
    job = Job(
        global_batch=2, mode="replicate", precision="fp32", savings=Savings(recompute=recompute), **COUNTED_JOBS[name]
    )
    time = planned(job)
    assert _counted(job) == sum(sum(terms.values()) for stage, terms in time.flops.items() if stage != "loss")
    assert ("recomputation" in time.flops) == (recompute != "none")
    assert ("teacher" in time.flops) == name.startswith("student")


def test_operations_agree_with_the_formula() -> None:
    job = Job.of(get_recipe("eva02-e-14-plus"), gpus=144, mode="shard", caption_tokens=77)
    job = replace(job, options={"vision": {"layers": 3}, "text": {"layers": 2}})
    flops = planned(job).flops
    expected = flops_per_sample(job.config, 0.5, job.savings, text_tokens=77)
    assert sum(flops["forward"].values()) == pytest.approx(job.local_batch * expected, rel=1e-6)
    # All but the last product of each block is done again.
    assert 0.7 < sum(flops["recomputation"].values()) / sum(flops["forward"].values()) < 1


def test_chunks_pass_forward_twice() -> None:
    options = {"vision": {"layers": 2}, "text": {"layers": 1}}
    savings = Savings(recompute="block")
    job = Job(model="EVA02-CLIP-L-14", options=options, gpus=8, global_batch=8 * 64, mode="shard", savings=savings)
    whole, cut = (planned(replace(job, accumulation=n)) for n in (1, 4))
    for term in ("products", "attention"):
        assert cut.flops["forward"][term] == pytest.approx(2 * whole.flops["forward"][term], rel=0.01)
        assert cut.flops["backward"][term] == pytest.approx(whole.flops["backward"][term], rel=0.01)


def test_chunks_of_a_mean_over_samples_pass_once() -> None:
    job = Job(model="eva02_base_patch14_224", task=STUDENT, options=IMAGE, gpus=2, global_batch=48)
    whole, cut = (planned(replace(job, accumulation=n)) for n in (1, 4))
    assert cut.flops.keys() == {"teacher", "forward", "backward"}
    for stage, terms in cut.flops.items():
        # The teacher's positions are resized once a chunk.
        assert terms == pytest.approx(whole.flops[stage], rel=0.02)
    assert cut.model_flops == whole.model_flops


@pytest.mark.exhaustive
@pytest.mark.parametrize(("reshard", "gathers"), [(True, 2), (False, 1)])
def test_what_sharding_sends(reshard: bool, gathers: int) -> None:
    job = Job(model="EVA02-CLIP-L-14", gpus=8, global_batch=8 * 16, reshard=reshard)
    memory = plan_memory(job)
    sent = {"gather": 0, "scatter": 0}
    for (_, cost), calls in memory.steps.costs(1, again=True).items():
        if cost.term in sent:
            sent[cost.term] += calls * cost.bytes
    parameters = sum(p.numel() for p in create_model(job.model, device="meta").parameters())
    assert sent["gather"] == pytest.approx(gathers * 2 * parameters, rel=0.01)
    assert sent["scatter"] == pytest.approx(4 * parameters, rel=0.01)


def test_the_slower_of_operations_and_bytes_counts() -> None:
    product = Cost("products", False, 16, int(312e12), int(1e9))
    assert seconds_of(product, A100, FULL, 0) == pytest.approx(1.0)
    assert seconds_of(product._replace(bits=32), A100, FULL, 0) == pytest.approx(312 / 19.5)
    assert seconds_of(product._replace(bytes=int(4078e9)), A100, FULL, 0) == pytest.approx(2.0)
    copy = Cost("elementwise", False, 16, 0, int(2039e9))
    assert seconds_of(copy, A100, FULL, 0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "term", "rate", "turns", "size"),
    [
        ({"gpus": 8}, "gather", 300, 1, 8),
        ({"gpus": 16}, "scatter", 200, 1, 16),
        ({"gpus": 16, "mode": "hybrid", "shard_size": 8}, "gather", 300, 1, 8),
        ({"gpus": 16, "mode": "hybrid", "shard_size": 8}, "reduce", 25, 2, 2),
        ({"gpus": 16, "mode": "hybrid", "shard_size": 8}, "gather of texts", 200, 1, 16),
        ({"gpus": 8, "mode": "replicate"}, "reduce", 300, 2, 8),
        ({"gpus": 1, "mode": "replicate"}, "reduce", math.inf, 2, 1),
    ],
)
def test_links_that_collectives_use(options: dict[str, Any], term: str, rate: float, turns: int, size: int) -> None:
    job = Job(model="tiny", global_batch=16, **options)
    cost = Cost(term, False, 0, 0, int(1e9))
    expected = turns * (size - 1) / size / rate
    assert seconds_of_collective(cost, job, A100, FULL, 1) == pytest.approx(expected)


def test_a_run_is_its_steps() -> None:
    options = {"vision": {"layers": 2}, "text": {"layers": 1}}
    job = Job(model="EVA02-CLIP-B-16", options=options, gpus=8, global_batch=8192, samples=8_192_000)
    time = planned(job)
    slow, fast = time.step
    assert slow > fast > 0
    assert time.gpu_hours(job) == pytest.approx((slow * 8000 / 3600, fast * 8000 / 3600))
    assert 0 < time.utilization(job, A100)[0] < time.utilization(job, A100)[1] < 1
    assert fast == pytest.approx(
        sum(seconds[1] for name, seconds in time.terms.items() if name != "communication"), rel=0.05
    )


@pytest.mark.parametrize("kept", [True, False])
def test_products_of_the_loss(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(model="EVA02-CLIP-B-16", gpus=4, global_batch=256)
    image, text, scale = torch.randn(64, 512), torch.randn(256, 512), torch.ones(())
    with FlopCounterMode(display=False) as counter:
        if kept:
            *statistics, logits = contrastive.contrastive_kept_forward(image, text, scale, 0)
            saved, backward = (logits,), contrastive.contrastive_kept_backward
        else:
            statistics = contrastive.contrastive_forward(image, text, scale, 0)
            saved, backward = (), contrastive.contrastive_backward
        row_lse, col_lse, positive = statistics[:3]
        inputs = *(torch.ones_like(value) for value in (row_lse, col_lse, positive)), image, text, scale
        backward(*inputs, row_lse, col_lse, *saved, 0, (True, True))
    if not kept:
        monkeypatch.setattr("evaclip.plan.loss.MEMORY_BUDGET", 0)
    planned = sum(calls * cost.flops for (_, cost), calls in loss_costs(job).items())
    assert planned == counter.get_total_flops()
    assert (loss_bytes(job)["loss"] > 2 * 64 * 256 * 4 + 3 * 256 * 512 * 4) == kept
