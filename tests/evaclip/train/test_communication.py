"""What the profiler's events say of communication. Real processes: test_data_parallel.py, test_sharding.py."""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from evaclip.train.communication import UNKNOWN, CommunicationSampler, shares_of
from evaclip.train.config import TrainConfig
from evaclip.train.distributed import World

CPU = torch.device("cpu")


def event(name: str, start: float, end: float, device: Any = DeviceType.CPU, annotation: bool = False) -> Any:
    """One of the profiler's, with times in seconds."""
    fields = {
        "name": name, "start_ns": 1e9 * start, "end_ns": 1e9 * end, "device_type": device,
        "is_user_annotation": annotation,
    }  # fmt: skip
    return SimpleNamespace(**{field: partial(lambda value: value, value) for field, value in fields.items()})


def test_on_a_cpu_collectives_are_those_of_gloo() -> None:
    events = [
        event("gloo:all_reduce", 1, 3), event("gloo:all_gather", 2, 4), event("gloo:all_reduce", 6, 7),
        event("c10d::allreduce_", 1, 4), event("FSDP::pre_forward (0)", 0, 9), event("aten::mm", 3.5, 6.5),
        event("aten::empty", 3.6, 3.7),
    ]  # fmt: skip
    assert shares_of(events, 10.0) == pytest.approx((0.4, 0.3))


def test_communication_counts_kernels_not_ranges() -> None:
    events = [
        event("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 0, 4, DeviceType.CUDA),
        event("gemm_kernel", 1, 2, DeviceType.CUDA),
        event("Memcpy DtoD", 3, 5, DeviceType.CUDA),
        event("FSDP::all_gather (0)", 0, 4, DeviceType.CUDA, annotation=True),
        event("nccl:all_gather", 0, 8),
        event("cudaLaunchKernel", 0, 8),
    ]
    assert shares_of(events, 8.0) == pytest.approx((0.5, 0.25))


def test_a_profiler_that_saw_nothing_gives_no_number() -> None:
    assert shares_of([event("cudaLaunchKernel", 0, 1)], 1.0) is UNKNOWN
    assert shares_of([event("aten::mm", 0, 1)], 1.0) == (0.0, 0.0)


def test_nothing_is_profiled_by_default(run_config: Callable[..., TrainConfig]) -> None:
    sampler = CommunicationSampler(World(CPU, size=2), run_config().log.communication_every)
    assert not any(sampler.is_due(step, 1) for step in range(100))


def test_communication_is_sampled_every_nth_record() -> None:
    two = CommunicationSampler(World(CPU, size=2), every=3)
    assert [step for step in range(80) if two.is_due(step, 5)] == [5, 20, 35, 50, 65]
    assert [step for step in range(9) if CommunicationSampler(World(CPU, size=2), 1).is_due(step, 4)] == [4, 8]
    for sampler in (CommunicationSampler(World(CPU, size=2), None), CommunicationSampler(World(CPU), 1)):
        assert not any(sampler.is_due(step, 1) for step in range(9))


def test_a_sample_is_told_once() -> None:
    sampler = CommunicationSampler(World(CPU, size=2), every=1)
    assert all(math.isnan(share) for share in sampler.take())
    with sampler.step():
        torch.ones(4) @ torch.ones(4)
    assert sampler.take() == (0.0, 0.0)
    assert sampler.take() is UNKNOWN
    assert CommunicationSampler(World(CPU), every=1).take() == (0.0, 0.0)
