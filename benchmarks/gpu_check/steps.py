"""Whole training steps: samples a second, MFU, and the memory that `evaclip plan` foretells."""

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.stage import Refusal, Settings
from evaclip.errors import UserError
from evaclip.machine import version_of

STEPS = (
    ("EVA02-CLIP-B-16", 512, 0.0),
    ("EVA02-CLIP-B-16", 1024, 0.5),
    ("EVA02-CLIP-L-14", 256, 0.0),
    ("EVA02-CLIP-L-14", 512, 0.5),
)
"""Model, samples and share of the patches that is dropped: what the plan finds room for in 80 GB."""
REHEARSED = (("emoji", 4, 0.5),)
_WARM_UPS, _TIMED = 3, 10
_CAPTION_TOKENS = 15


def name_of(model: str, batch: int, dropout: float) -> str:
    """`EVA02-CLIP-B-16 b512 drop50`."""
    return f"{model} b{batch}" + (f" drop{dropout:.0%}".rstrip("%") if dropout else "")


def measure(model: str, batch: int, dropout: float, settings: Settings) -> dict[str, Any]:
    """Times the trainer's own step, LAMB included, in bfloat16 by autocast.

    Returns:
        seconds of the median step, samples a second, MFU, peak bytes measured and planned, and what was noted.
    """
    if version_of("pydantic") is None:
        raise Refusal("the trainer needs pydantic, which isn't installed")
    from evaclip.model.config import get_config
    from evaclip.model.flops import flops_per_sample
    from evaclip.plan.job import Job
    from evaclip.plan.memory import plan_memory
    from evaclip.train.throughput import BACKWARD_FACTOR, peak_flops

    device = torch.device(settings.device)
    longest = get_config(model).text.context_length
    job = Job(
        model=model,
        global_batch=batch,
        token_dropout=dropout,
        mode="replicate",
        caption_tokens=min(_CAPTION_TOKENS, longest),
    )
    planned = plan_memory(job).peak.total
    step, images, tokens, note = _step(job, device)
    seconds, peak = _timed(step, images, tokens, device, settings.rehearsal)
    flops = BACKWARD_FACTOR * flops_per_sample(job.config, 1 - dropout) * batch
    return {
        "model": model,
        "batch": batch,
        "dropout": dropout,
        "seconds": median(seconds),
        "samples_per_second": batch / median(seconds),
        "mfu": flops / median(seconds) / peak_flops(device, "amp_bf16"),
        "peak_bytes": peak,
        "planned_bytes": planned,
        "notes": [note] if note else [],
    }


def _step(job: Any, device: torch.device) -> tuple[Any, Tensor, Tensor, str]:
    from evaclip import create_model
    from evaclip.train.config import LossConfig, OptimConfig
    from evaclip.train.distributed import World
    from evaclip.train.loss import ContrastiveLoss
    from evaclip.train.optimizer import build_optimizer, parameter_groups
    from evaclip.train.step import StepOptions, TrainStep
    from evaclip.train.tasks.contrastive import Contrastive

    torch.manual_seed(0)
    model = create_model(job.model, device=device, vision={"patch_dropout": job.token_dropout})
    task, options = Contrastive(model, ContrastiveLoss(LossConfig()).to(device)), OptimConfig()
    optimizer = build_optimizer(parameter_groups(model, task.towers, options), options)
    images = torch.randn(job.global_batch, 3, *job.config.vision.image_shape, device=device)
    tokens, note = _tokens(job)
    step = TrainStep(task, optimizer, StepOptions(job.precision), World(device))
    return step, images, tokens.to(device), note


def _tokens(job: Any) -> tuple[Tensor, str]:
    """Captions of photographs; where their tokenizer can't be had, ids drawn at random."""
    text = job.config.text
    try:
        from benchmarks.cases._captions import captions

        known = captions(text.context_length)
        if int(known.max()) < text.vocab_size:
            return known[torch.randint(len(known), (job.global_batch,))], ""
    except (ImportError, UserError):
        pass
    ids = torch.randint(1, text.vocab_size - 2, (job.global_batch, text.context_length))
    ids[:, 0], ids[:, job.caption_tokens - 1] = text.vocab_size - 2, text.vocab_size - 1
    ids[:, job.caption_tokens :] = 0
    return ids, f"captions of {job.caption_tokens} tokens drawn at random"


def _timed(step: Any, images: Tensor, tokens: Tensor, device: torch.device, short: bool) -> tuple[list[float], int]:
    warm_ups, timed = (1, 1) if short else (_WARM_UPS, _TIMED)
    seconds: list[float] = []
    for number in range(warm_ups + timed):
        if number == warm_ups and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        step(images, tokens, number).loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return seconds[warm_ups:], peak
