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
    from evaclip.data.config import DataConfig
    from evaclip.model.config import get_config
    from evaclip.model.flops import flops_per_sample
    from evaclip.plan.step import plan_step
    from evaclip.train.config import ModelConfig, OptimConfig, ScheduleConfig, TrainConfig
    from evaclip.train.throughput import BACKWARD_FACTOR, peak_flops

    device = torch.device(settings.device)
    run = TrainConfig(
        name="step",
        batch_size=batch,
        data=DataConfig(),
        schedule=ScheduleConfig(steps=1),
        precision="amp_bf16",
        model=ModelConfig(name=model, patch_dropout=dropout),
        optim=OptimConfig(name="lamb"),
    )
    words = min(_CAPTION_TOKENS, get_config(model).text.context_length)
    planned = plan_step(run, caption_tokens=words).memory.total()
    step, images, tokens, note = _step(run, words, device)
    seconds, peak = _timed(step, images, tokens, device, settings.rehearsal)
    flops = BACKWARD_FACTOR * flops_per_sample(get_config(model), 1 - dropout) * batch
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


def _step(run: Any, words: int, device: torch.device) -> tuple[Any, Tensor, Tensor, str]:
    from evaclip.train.build import build_step, build_task
    from evaclip.train.distributed import World

    torch.manual_seed(0)
    task: Any = build_task(run, World(device))
    images = torch.randn(run.batch_size, 3, *task.visual.config.image_shape, device=device)
    tokens, note = _tokens(task.model.config.text, run.batch_size, words)
    return build_step(run, World(device), task), images, tokens.to(device), note


def _tokens(text: Any, count: int, words: int) -> tuple[Tensor, str]:
    """Captions of photographs; where their tokenizer can't be had, ids drawn at random."""
    try:
        from benchmarks.cases._captions import captions

        known = captions(text.context_length)
        if int(known.max()) < text.vocab_size:
            return known[torch.randint(len(known), (count,))], ""
    except (ImportError, UserError):
        pass
    ids = torch.randint(1, text.vocab_size - 2, (count, text.context_length))
    ids[:, 0], ids[:, words - 1] = text.vocab_size - 2, text.vocab_size - 1
    ids[:, words:] = 0
    return ids, f"captions of {words} tokens drawn at random"


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
