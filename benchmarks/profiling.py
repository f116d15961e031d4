"""Where the time of a call goes: a trace of a few calls.

For the kernels' counters, which ncu has, `python -m benchmarks.profiling OPERATION SHAPE MODE DTYPE CANDIDATE` makes
one call between the marks of the CUDA profiler.
"""

import gzip
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import INSTALLED
from benchmarks.candidates import Candidate, candidates
from benchmarks.measure import DTYPES, Case, make_call
from benchmarks.operation import get_operation, load
from evaclip.atomic import replacing
from evaclip.errors import unknown_name

_WARM_UPS, _CALLS = 3, 3


def profile_case(case: Case, candidate: Candidate, folder: Path) -> Path:
    """Traces a few calls; the trace opens in Perfetto and in chrome://tracing.

    Each call is a range named `<operation>: <candidate>`, on a GPU for NVTX too.

    Returns:
        The trace, `<operation>-<candidate>-<shape>-<mode>-<dtype>.json.gz` in `folder`, which is made if need be.

    Raises:
        Exception: whatever the candidate raises, if it can't do this case.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_file_name(case, candidate)}.json.gz"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if case.device.type == "cuda" else [])
    profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
    with _warm_call(case, candidate) as call, profiler:
        for _ in range(_CALLS):
            with _range(case, candidate):
                call()
        _wait(case)
    with tempfile.TemporaryDirectory() as scratch, replacing(path) as temporary:
        plain = Path(scratch, "trace.json")
        profiler.export_chrome_trace(str(plain))
        temporary.write_bytes(gzip.compress(plain.read_bytes()))
    return path


def main(arguments: Sequence[str], device: str = "cuda") -> None:
    """Makes one call of a candidate between the marks of the CUDA profiler.

    Args:
        arguments: names of operation, shape, mode, dtype and candidate; `--installed` was obeyed before.
        device: where.

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
        with _range(case, found[name]):
            call()
        _wait(case)


@contextmanager
def _warm_call(case: Case, candidate: Candidate) -> Iterator[Callable[[], object]]:
    """A call that was made before, in the candidate's context."""
    case.functions[candidate.name] = candidate.build(case.shape)
    call = make_call(case, candidate, case.draw())
    with candidate.context():
        for _ in range(_WARM_UPS):
            call()
        _wait(case)
        yield call


@contextmanager
def _range(case: Case, candidate: Candidate) -> Iterator[None]:
    name = f"{case.op.name}: {candidate.name}"
    with record_function(name), torch.cuda.nvtx.range(name) if case.device.type == "cuda" else nullcontext():
        yield


def _wait(case: Case) -> None:
    if case.device.type == "cuda":
        torch.cuda.synchronize(case.device)


def _file_name(case: Case, candidate: Candidate) -> str:
    dtype = str(case.dtype).removeprefix("torch.")
    return re.sub(r"[^\w@.-]+", "_", f"{case.op.name}-{candidate.name}-{case.shape.name}-{case.mode}-{dtype}")


if __name__ == "__main__":
    main(sys.argv[1:])
