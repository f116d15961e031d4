"""What a call costs the host before any kernel matters: small tensors, ours beside the same in torch's functions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import evakernels
from benchmarks.machine import byline
from benchmarks.table import make_console, plain_table
from benchmarks.timing import Call, Rotation, Timer
from evakernels import _native

ROWS, WIDTH = 4, 64
"""Of each tensor: a kernel takes well under a microsecond."""
SECONDS = 1.0
"""About what is spent on each call."""

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Pair:
    """The same computation by this library and by torch, of matrices `[ROWS, WIDTH]` and then of vectors `[WIDTH]`."""

    ours: Function
    torch: Function
    matrices: int
    vectors: int


class _TorchsKernels(torch.autograd.Function):
    """Torch's own LayerNorm, with its gradient in Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, (WIDTH,), weight, bias, 1e-5)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        backward = torch.ops.aten.native_layer_norm_backward.default
        return backward(dy, x, [WIDTH], mean, rstd, weight, bias, [True] * 3)


def _least(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What any op costs that isn't a part of torch: in training Python's autograd, else a call by the dispatcher.

    Kernels are torch's in training, and those of the compiled library, called without any question, else.
    """
    if torch.is_grad_enabled():
        y: Tensor = _TorchsKernels.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    op = torch.ops.evakernels_native.layer_norm_forward.default
    return op(x, weight, bias, 1e-5, False, None)[0] if _native.LOADED else F.layer_norm(x, (WIDTH,), weight, bias)


PAIRS = {
    "layer_norm": Pair(evakernels.layer_norm, lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b), 1, 2),
    "layer_norm, the least": Pair(_least, lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b), 1, 2),
    "rms_norm": Pair(evakernels.rms_norm, lambda x, w: F.rms_norm(x, (WIDTH,), w), 1, 1),
    "add_layer_norm": Pair(
        lambda *given: evakernels.add_layer_norm(*given)[0],
        lambda residual, branch, w, b: F.layer_norm(residual + branch, (WIDTH,), w, b),
        2,
        2,
    ),
    "gelu": Pair(evakernels.gelu, lambda x, b: F.gelu(x + b), 1, 1),
    "swiglu": Pair(evakernels.swiglu, lambda gate, up: F.silu(gate) * up, 2, 0),
}


@dataclass(frozen=True)
class Overhead:
    """Microseconds of a call, medians over rounds in which both took turns."""

    name: str
    ours: float
    torch: float

    @property
    def ratio(self) -> float:
        return self.ours / self.torch


def measure(device: torch.device, seconds: float = SECONDS) -> list[Overhead]:
    """Of each pair the forward pass without gradients, and a forward and a backward pass with all of them.

    With one thread: several would wait for one another longer than such a call takes.
    """
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for kind, make in (("forward", _forward), ("training", _training)):
            for name, pair in PAIRS.items():
                calls = [make(function, _inputs(pair, device)) for function in (pair.ours, pair.torch)]
                found.append(_measured(f"{name} {kind}", calls, device, seconds))
    finally:
        torch.set_num_threads(threads)
    return found


def show(found: list[Overhead], device: torch.device) -> None:
    """A table, and what it was measured on."""
    table = plain_table("call", "evakernels", "torch", "ratio")
    for row in found:
        table.add_row(row.name, f"{row.ours:.1f}", f"{row.torch:.1f}", f"{row.ratio:.2f}")
    console = make_console()
    console.print(f"Host time of a call on {ROWS} x {WIDTH} elements, microseconds")
    console.print(table)
    console.print(f"one thread; {byline(device)}", style="dim")


def _inputs(pair: Pair, device: torch.device) -> list[Tensor]:
    sizes = [(ROWS, WIDTH)] * pair.matrices + [(WIDTH,)] * pair.vectors
    return [torch.rand(size, device=device) + 0.5 for size in sizes]


def _forward(function: Function, inputs: list[Tensor]) -> Call:
    def call() -> object:
        with torch.no_grad():
            return function(*inputs)

    return call


def _training(function: Function, inputs: list[Tensor]) -> Call:
    leaves = [x.requires_grad_() for x in inputs]
    dout = torch.ones_like(inputs[0])
    return lambda: torch.autograd.grad(function(*leaves), leaves, dout)


def _measured(name: str, calls: list[Call], device: torch.device, seconds: float) -> Overhead:
    @contextmanager
    def idle() -> Iterator[None]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield

    for call in calls:
        call()
    ours, theirs = Timer().rounds([Rotation([call], idle) for call in calls], seconds)
    return Overhead(name, 1e3 * median(ours), 1e3 * median(theirs))
