"""Traces of single calls.

For kernel counters with ncu, `python -m benchmarks.profiling OPERATION SHAPE MODE DTYPE CANDIDATE` makes one call
between the marks of the CUDA profiler.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import INSTALLED
from benchmarks.candidates import Candidate, candidates
from benchmarks.measure import DTYPES, Case, make_call
from benchmarks.operation import get_operation, load
from evaclip.errors import unknown_name

_WARM_UPS, _CALLS = 3, 3


def profile_case(case: Case, candidate: Candidate, folder: Path) -> Path:
    """Traces a few calls; the trace opens in Perfetto and in chrome://tracing.

    Each call is a range named `<operation>: <candidate>`, on a GPU for NVTX too.

    Returns:
        The trace, `<operation>-<candidate>-<shape>-<mode>-<dtype>.json.gz` in `folder`, which is made if need be.

    Raises:
        Exception: the candidate's error, if it can't do this case.
    """
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{case.op.name}-{candidate.name}-{case.shape.name}-{case.mode}-{case.dtype_name}"
    name = re.sub(r"[^\w@.-]+", "_", title)
    path = folder / f"{name}.json.gz"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if case.device.type == "cuda" else [])
    profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
    with _warm_call(case, candidate) as call, profiler:
        for _ in range(_CALLS):
            call()
    profiler.export_chrome_trace(str(path))
    return path


def main(arguments: Sequence[str], device: str = "cuda") -> None:
    """Makes one call of a candidate between the marks of the CUDA profiler.

    Args:
        arguments: names of operation, shape, mode, dtype and candidate; `--installed` was obeyed before.
        device: the device type.

    Raises:
        UserError: a name is unknown.
    """
    load()
    op, shape, mode, dtype, name = (word for word in arguments if word != INSTALLED)
    operation = get_operation(op)
    case = Case(operation, operation.shape(shape), mode, DTYPES[dtype], torch.device(device))
    found = {candidate.name: candidate for candidate in candidates(case.op, device)[0]}
    if name not in found:
        raise unknown_name("candidate", name, found)
    marks = torch.cuda.profiler.profile() if device == "cuda" else nullcontext()
    with _warm_call(case, found[name]) as call, marks:
        call()


@contextmanager
def _warm_call(case: Case, candidate: Candidate) -> Iterator[Callable[[], None]]:
    """A call, which was made before, in the candidate's context and as a range; it waits for the device."""
    case.functions[candidate.name] = candidate.build(case.shape)
    function, name = make_call(case, candidate, case.draw()), f"{case.op.name}: {candidate.name}"
    on_gpu = case.device.type == "cuda"

    def call() -> None:
        with record_function(name), torch.cuda.nvtx.range(name) if on_gpu else nullcontext():
            function()
        if on_gpu:
            torch.cuda.synchronize(case.device)

    with candidate.context():
        for _ in range(_WARM_UPS):
            function()
        yield call


if __name__ == "__main__":
    main(sys.argv[1:])
