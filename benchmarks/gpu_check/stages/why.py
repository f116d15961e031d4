"""Why a kernel takes as long as it does: ncu's counters of the slowest kernel of each family, CUDA and Triton.

ncu runs `python -m benchmarks.profiling`, one training step of the op between the marks of the CUDA profiler.
"""

import csv
import importlib
import io
import shutil
import subprocess
import sys
from collections import defaultdict
from functools import partial
from typing import Any

from benchmarks.gpu_check.kernels import cuda_ops, triton_ops
from benchmarks.gpu_check.stage import Refusal, Session, Settings, Unit
from benchmarks.operation import Operation, get_operation
from benchmarks.origin import ROOT

SECONDS = 60
_NORMS = ("layer_norm", "add_layer_norm", "layer_norm_add")
_OPTIMIZERS = ("lamb_step", "adamw_step")
_ATTENTION = ("rope_attention", "causal_attention", "packed_attention")
_OPS = (*_ATTENTION, *_NORMS, "swiglu", "token_dropout", "gelu", *_OPTIMIZERS, "clip_loss", "siglip_loss")
_SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats")
_MORE = {
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor_percent",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank_conflicts",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "stalled_at_barriers",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "stalled_on_memory",
}
"""Counters whose names change from one generation of GPUs to the next."""
METRICS = _MORE | {
    "Duration": "nanoseconds",
    "DRAM Throughput": "memory_percent",
    "Compute (SM) Throughput": "compute_percent",
    "Achieved Occupancy": "occupancy_percent",
    "Registers Per Thread": "registers",
    "Dynamic Shared Memory Per Block": "shared_bytes",
}
"""ncu's names, and what they are called in the journal."""


def units(settings: Settings) -> list[Unit]:
    """One an op."""
    return [Unit("why", op, seconds=20, limit=120, value=52) for op in _OPS[: 1 if settings.rehearsal else None]]


def run(unit: Unit, session: Session) -> None:
    importlib.import_module("benchmarks.cases")
    op = get_operation(unit.name)
    for backend in (name for name, ops in (("cuda", cuda_ops()), ("triton", triton_ops())) if op.registered in ops):
        session.case(f"{unit.name} on {backend}", partial(_counters, op, backend, session.settings))


def _counters(op: Operation, backend: str, settings: Settings) -> dict[str, Any]:
    if settings.device != "cuda":
        raise Refusal("ncu counts on a GPU")
    if shutil.which("ncu") is None:
        raise Refusal("ncu is not installed")
    call = [op.name, op.shapes["cuda"][0], op.modes[-1], settings.dtypes[0], f"evakernels {backend}"]
    counters = [word for section in _SECTIONS for word in ("--section", section)]
    # Of metrics that it doesn't know ncu counts none at all.
    for more in (["--metrics", ",".join(_MORE)], []):
        command = ["ncu", "--csv", "--profile-from-start", "off", *counters, *more, "--target-processes", "all"]
        command += [sys.executable, "-m", "benchmarks.profiling", *call]
        pipe, same = subprocess.PIPE, subprocess.STDOUT
        output = subprocess.run(command, cwd=ROOT, stdout=pipe, stderr=same, text=True, check=False).stdout
        if kernels := parse(output):
            break
    if not kernels:
        raise Refusal(f"ncu counted nothing: {' '.join(output.split())[-400:]}")
    return {"shape": call[1], "mode": call[2], "dtype": call[3], "kernels": len(kernels), **kernels[0]}


def parse(output: str) -> list[dict[str, Any]]:
    """The kernels of `ncu --csv`, the slowest first: `kernel`, and the metrics that it gave numbers for."""
    start = output.find('"ID"')
    if start < 0:
        return []
    kernels: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in csv.DictReader(io.StringIO(output[start:])):
        if row.get("Metric Name") not in METRICS:
            continue
        kernel = kernels[row["ID"]]
        kernel["kernel"] = row["Kernel Name"][:200]
        kernel[METRICS[row["Metric Name"]]] = _number(row["Metric Value"], row["Metric Unit"])
    return sorted(kernels.values(), key=lambda kernel: -kernel.get("nanoseconds", 0.0))


_SCALES = {"second": 1e9, "s": 1e9, "msecond": 1e6, "ms": 1e6, "usecond": 1e3, "us": 1e3}
_SCALES |= {"Kbyte/block": 1e3, "Mbyte/block": 1e6}


def _number(text: str, unit: str) -> float | None:
    """In the unit without a prefix, nanoseconds or bytes; None for what isn't a number."""
    try:
        return float(text.replace(",", "")) * _SCALES.get(unit, 1.0)
    except ValueError:
        return None
