"""How fast the device could be, of which training reaches a share (MFU)."""

import time
from functools import cache

import torch

from evaclip.train.config import Precision
from evakernels.nn import linear

BACKWARD_FACTOR = 3
"""A training step costs three forward passes; recomputation for activation checkpointing is not counted as useful."""

# Dense TFLOP/s from the makers' data sheets: (fp16 / bf16 with fp32 sums, fp32 as torch multiplies by default).
# The longest name that occurs in the device's name counts.
_DATA_SHEET_TFLOPS = {
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


def peak_flops(device: torch.device, precision: Precision) -> float:
    """Peak FLOP/s: from the GPU's data sheet, or else measured by a short matrix product (0.2 s, once)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [key for key in _DATA_SHEET_TFLOPS if key in name]
        if known:
            half, single = _DATA_SHEET_TFLOPS[max(known, key=len)]
            return (single if precision == "fp32" else half) * 1e12
    return _measure_peak(device, _matmul_type(precision))


def _matmul_type(precision: Precision) -> torch.dtype:
    if precision == "fp32":
        return torch.float32
    return torch.bfloat16 if precision.endswith("bf16") else torch.float16


# Once for each process, of numbers that leave the run's own random numbers alone.
@cache
def _measure_peak(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.2) -> float:
    a = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    _timed_product(a)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, _timed_product(a))
    return 2 * size**3 / best


def _timed_product(a: torch.Tensor) -> float:
    start = time.perf_counter()
    # Reading one element waits for the device.
    linear(a, a)[0, 0].item()
    return time.perf_counter() - start
