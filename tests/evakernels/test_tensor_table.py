"""The optimizers' Triton kernels as the host sees them: how many launches, and what is copied to the device.

Nothing is compiled or run: a driver of a GPU that isn't there takes the launches' place.
"""

from collections import Counter

import pytest
import torch
from optimizer_checks import lists

from evakernels import triton

pytest.importorskip("triton")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BETAS = 0.9, 0.98, 1e-6


@pytest.fixture
def table():
    from evakernels.triton import _tensor_table

    for kept in (_tensor_table._layout, _tensor_table._numbers):
        kept.cache_clear()
    return _tensor_table


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched; none is compiled."""
    from triton import knobs
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction
    from triton_compile import AbsentGPU

    names, run = [], JITFunction.run

    def noted(self, *args, **options):
        names.append(self.fn.__name__)
        return run(self, *args, **options)

    monkeypatch.setattr(driver, "_active", AbsentGPU(90))
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **_: True)
    monkeypatch.setattr(JITFunction, "run", noted)
    return names


@pytest.fixture
def copied(monkeypatch, table):
    """Sizes of what is copied to the device."""
    sizes, copy = [], table._copied
    monkeypatch.setattr(table, "_copied", lambda host, device: sizes.append(tuple(host.shape)) or copy(host, device))
    return sizes


def adamw(state, lrs=None, seeds=()):
    count = len(state[0])
    arguments = [lrs or [0.1] * count, [0.0] * count, BETAS, None, None, list(seeds), [0] * len(seeds)]
    triton.launcher("adamw_update")(*state, *arguments)


def test_optimizer_step_launches_once_per_phase(launched):
    state = lists(sizes=[16 * (1 + i % 7) for i in range(300)])
    adamw(state)
    assert launched == ["prepare_kernel", "update_kernel"]
    launched.clear()
    numbers = [0.1] * 300
    triton.launcher("lamb_step")(*state, numbers, numbers, BETAS, True, None, None, [], [])
    update, apply = ["prepare_kernel", "update_kernel", "norms_kernel"], ["prepare_kernel", "apply_kernel"]
    assert launched == update + apply


def test_dtypes_and_alignments_split_launches(launched):
    mixed = [lists((dtype, dtype, F32, F32), [32, 33, 64]) for dtype in (F32, BF16, F16)]
    adamw([[t for part in parts for t in part] for parts in zip(*mixed, strict=True)])
    assert Counter(launched) == {"prepare_kernel": 1, "update_kernel": 6}
    launched.clear()
    state = lists(sizes=[0, 0])
    adamw(state)
    assert launched == ["prepare_kernel"]


def test_kernels_are_compiled_per_dtype_only(monkeypatch, launched):
    from triton import knobs

    keys = set()
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda *, fn, key, **_: keys.add((fn.name, key)) or True)
    for sizes in ([16], [32] * 2, [160] * 16, [16, 7], [8192 * 3] * 17, [3] * 129):
        for rates in (0.1, 1.0):
            adamw(lists(sizes=sizes), [rates] * len(sizes))
    assert Counter(name.rpartition(".")[2] for name, _ in keys) == {"prepare_kernel": 1, "update_kernel": 2}


def test_step_copies_changed_rates_only(launched, copied):
    state = lists((BF16, BF16, F32, F32), [32, 64, 8192 + 16])
    adamw(state, seeds=[1, 2, 3])
    assert sorted(copied) == [(3, 2), (3, 2), (3, 2), (3, 5), (4, 3)]  # seeds, rates, spans; pointers; chunks
    copied.clear()
    adamw(state, seeds=[1, 2, 3])
    assert copied == []
    adamw(state, [0.1, 0.1, 0.2], seeds=[1, 2, 3])
    assert copied == [(3, 2)]
    copied.clear()
    state[1][1] = state[1][1].clone()
    adamw(state, [0.1, 0.1, 0.2], seeds=[1, 2, 3])
    assert copied == [(3, 5)]


class Capture:
    """`torch.cuda`, as a thread finds it: on stream 7, or while a graph is captured there."""

    def __init__(self, is_captured):
        self.is_current_stream_capturing = lambda: is_captured
        self.current_stream = lambda device: self
        self.cuda_stream = 7


def test_a_captured_graph_has_copies_of_its_own(monkeypatch, table):
    """Kept ones would be written by its replays alone, and freed when they are forgotten."""
    gpu, made = torch.device("cuda", 0), []
    monkeypatch.setattr(table, "_copied", lambda host, device: made.append(host) or host)
    for is_captured, copies in ((True, 1), (False, 2), (False, 2), (True, 3)):
        monkeypatch.setattr(torch, "cuda", Capture(is_captured))
        table._kept(table._numbers, gpu, ((1, 2),), torch.int64)
        assert len(made) == copies


def test_sizes_beyond_32_bits_use_64_bit_bounds(table):
    device, size = torch.device("cpu"), (1 << 31) + 5
    kinds = ((False, F32), (False, F32))
    layout = table._layout(device, None, ("GRAD",), kinds, (size, 3), 1 << 20)
    assert layout.chunks[-2:].tolist() == [[0, 1 << 31, size], [1, 0, 3]]
    assert layout.spans.tolist() == [[0, 2049], [2049, 2050]]
    assert layout.launches == ((0, 2050, {"GRAD": table.tl.float32, "FITS": False}),)
