"""Is there light at all: every kernel that should exist does, can be launched, and says what its reference says.

A kernel that is missing is a failure: without this stage all the others could pass on what is left.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

import evakernels
import evakernels.triton
from benchmarks import accuracy, origin
from benchmarks.gpu_check import tiny
from benchmarks.gpu_check.kernels import cuda_ops, missing
from benchmarks.gpu_check.stage import Failure, Refusal, Session, Settings, Unit
from evakernels import _native, backends

SECONDS = 20
_LARGEST_ERROR = 0.03
"""Against the reference in float64, of 16-bit numbers: whether it's the right one of the next powers of two."""
_CYCLES = 200_000_000
"""Of a wait on the GPU, a tenth of a second."""


def units(settings: Settings) -> list[Unit]:
    """One for what is compiled, and one for each file of Triton kernels, whose compilations go side by side."""
    native = Unit("first_light", "cuda", seconds=20, value=100)
    triton = [
        Unit("first_light", f"triton {family}", seconds=30, value=99, alone=False)
        for family in evakernels.triton.FAMILIES
    ]
    return [native, *triton]


def run(unit: Unit, session: Session) -> None:
    settings = session.settings
    _, _, family = unit.name.partition(" ")
    if family:
        for op in evakernels.triton.FAMILIES[family]:
            session.case(f"{op} on triton", partial(compare, op, "triton", settings))
        return
    session.case("library", partial(_library, settings))
    for op in cuda_ops():
        session.case(f"{op} on cuda", partial(compare, op, settings.device, settings))
    session.case("another stream", partial(_stream, settings))


def _library(settings: Settings) -> dict[str, Any]:
    """What is installed; fails without kernels for this GPU."""
    info = evakernels.info() | {"package": origin.describe()}
    if not origin.is_checkout():
        raise Failure(f"evakernels isn't that of this checkout: {info['package']}", info)
    if not _native.LOADED:
        raise Failure(f"the compiled library is not loaded: {_native.REASON}", info)
    if absent := [op for op in cuda_ops() if missing(op, settings.device)]:
        raise Failure(f"no compiled kernel of {', '.join(absent)}", info)
    return info


def compare(op: str, backend: str, settings: Settings) -> dict[str, Any]:
    """One launch beside the reference in float64."""
    args = tiny.arguments(op, settings.device, getattr(torch, settings.dtypes[0]))
    if reasons := missing(op, backend) or missing(op, backend, *args):
        raise Failure(f"no kernel: {'; '.join(reasons)}", {})
    implementations = backends._implementations[op]
    found = results(implementations[backend].function, args)
    exact = accuracy.as_double({str(place): arg for place, arg in enumerate(args)})
    truth = results(implementations["reference"].function, tuple(exact.values()))
    if len(found) != len(truth):
        raise Failure(f"{len(found)} tensors came back where {len(truth)} were expected", {})
    error = accuracy.relative_error(found, truth)
    if not error <= _LARGEST_ERROR:  # true for NaN
        raise Failure(f"the error is {error:.1e}, at most {_LARGEST_ERROR:.0e} is right", {"error": error})
    return {"error": error}


def results(function: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """What an implementation returns and what it leaves in its arguments, which stay as they are."""
    own = copy.deepcopy(args)
    returned = accuracy.tensors(function(*own))
    left = list(backends.tensors(own))
    changed = [ours for ours, former in zip(left, backends.tensors(args), strict=True) if not torch.equal(ours, former)]
    return [*returned, *changed]


def _stream(settings: Settings) -> None:
    """A kernel is launched on torch's current stream: it waits for what that one still has to do."""
    if settings.device != "cuda":
        raise Refusal("a CPU has no streams")
    x = torch.zeros(64, 256, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), evakernels.use_backend("cuda"):
        torch.cuda._sleep(_CYCLES)
        x.fill_(1)
        y = evakernels.gelu(x)
    torch.cuda.synchronize()
    if not y.any():
        raise Failure("the kernel didn't wait for its own stream", {})
