"""Time, samples and tokens between two log records, and the peak speed and memory of the device."""

import resource
import time
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch

from evaclip.train.config import Precision

Item = TypeVar("Item")

BACKWARD_FACTOR = 3
"""A training step costs three forward passes; recomputation for activation checkpointing is not counted as useful."""

# Dense TFLOP/s from the makers' data sheets: (fp16 / bf16 with fp32 sums, fp32 as torch multiplies by default).
# A GPU has the row of the longest name in its name.
TFLOPS = {
    "B200": (2250.0, 75.0),
    "H200": (989.0, 67.0),
    "H100": (989.0, 67.0),
    "H100 NVL": (835.0, 60.0),
    "H100 PCIe": (756.0, 51.0),
    "A100": (312.0, 19.5),
    "A10": (125.0, 31.2),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """Dense peak FLOP/s of a GPU by its data sheet; None for CPUs and GPUs without a row in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [key for key in TFLOPS if key in name]
    if not known:
        return None
    half, single = TFLOPS[max(known, key=len)]
    return (single if precision == "fp32" else half) * 1e12


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on a GPU, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Interval(NamedTuple):
    """Work since the last reading.

    Attributes:
        samples: of all ranks.
        tokens: of this rank.
        seconds: duration, above 0.
        waited: part of `seconds` spent waiting for data.
    """

    samples: int
    tokens: int
    seconds: float
    waited: float


class Meter:
    """Measures intervals of training; call `restart` after anything else, such as saving.

    Args:
        seconds: duration of the run before this process.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._begin = time.monotonic() - seconds
        self.restart()

    def restart(self) -> None:
        """Drops the present interval and begins another one."""
        self._start = time.monotonic()
        self._waited = 0.0
        self._samples = 0
        self._tokens = 0

    def fetch(self, batches: Iterator[Item]) -> Item:
        """The next batch; its time counts as waiting."""
        before = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - before
        return batch

    def count(self, samples: int, tokens: int) -> None:
        self._samples += samples
        self._tokens += tokens

    def read(self) -> Interval:
        """The interval, which ends here."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        interval = Interval(self._samples, self._tokens, elapsed, self._waited)
        self.restart()
        return interval

    @property
    def seconds(self) -> float:
        """Duration of the run so far."""
        return time.monotonic() - self._begin
