"""The peak of a real sharded step, over gloo, as several processes find it."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from measured import batch_of, sharded_model
from torch.distributed._tools.mem_tracker import MemTracker

from evaclip.plan.job import Job
from evakernels import clip_loss


def peak(job: Job) -> int:
    """Bytes that process 0 holds at the highest moment of the second step, without moments.

    Torch's tracker is asked and not the allocator, because gloo allocates copies for itself.
    """
    model = sharded_model(job)
    images, tokens = batch_of(job)

    def step() -> None:
        features = model(images, tokens)
        clip_loss(features[0], features[1], features[2], group=dist.group.WORLD).backward()

    step()
    model.zero_grad()
    tracker = MemTracker()
    tracker.track_external(model, images, tokens)
    with tracker:
        step()
    total: int = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return total


def write_peaks(jobs: list[Job], file: Path) -> None:
    """Process 0 writes those of all jobs, as JSON."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    peaks = [peak(job) for job in jobs]
    if dist.get_rank() == 0:
        file.write_text(json.dumps(peaks))
    dist.destroy_process_group()
