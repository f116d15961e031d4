"""Launch configurations of the Triton kernels, searched on this GPU, an entry at a time; `merge` writes the file.

Takes longer than all the other stages, so it is run when it is asked for: `--only tuning`.
"""

from functools import partial
from typing import Any

import torch

from benchmarks.gpu_check.stage import Refusal, Session, Settings, Unit
from evakernels import tuning

SECONDS = 0


def units(settings: Settings) -> list[Unit]:
    """One an op that has configurations."""
    return [Unit("tuning", op, seconds=540, limit=300) for op in tuning.table("", 90)]


def run(unit: Unit, session: Session) -> None:
    for entry in _entries(unit.name, session.settings):
        name = " ".join(f"{size}={value}" for size, value in entry["shape"].items())  # head_dim=64 tokens=257
        session.case(name, partial(_search, unit.name, entry, session.settings))


def _entries(op: str, settings: Settings) -> list[dict[str, Any]]:
    gpu = ("", 90) if settings.device != "cuda" else tuning.gpu_of(torch.empty(0, device="cuda"))
    found: list[dict[str, Any]] = tuning.table(*gpu)[op]
    return found


def _search(op: str, entry: dict[str, Any], settings: Settings) -> dict[str, Any]:
    if settings.device != "cuda":
        raise Refusal("configurations are chosen by time on a GPU")
    from evakernels.tuning import search

    gpu, capability = tuning.gpu_of(torch.empty(0, device="cuda"))
    (found,) = search.tuned(op, [entry], search.median_time)
    return {"gpu": gpu, "capability": capability, "entry": found, "shipped": entry["config"]}
