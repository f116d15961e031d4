"""Times that the roofline predicts of the benchmarks' calls, for a machine that can't count: its bundle has them.

    python -m benchmarks.audit.prediction sm_90 FILE     counts calls of one image or caption, and writes FILE

What a call takes grows with its bytes by formula, so that a batch of one stands for all.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.audit.build import count_all
from benchmarks.audit.cases import OPTIMIZED, SHAPES, list_cases
from benchmarks.audit.pipes import GPUS
from benchmarks.audit.result import Count
from benchmarks.audit.roofline import limiter, times
from benchmarks.measure import Case
from benchmarks.operation import operations
from evaclip.atomic import write_text
from evaclip.errors import unknown_name

FILE = "predictions.json"
DTYPE = "bfloat16"
_MOST_SHAPES = 2  # of an operation: the first ones that are measured on a GPU
_DIRECTIONS = {"forward": ("forward",), "training": ("forward", "backward")}


def predict(arch: str) -> dict[str, Any]:
    """The `gpu` whose rates are meant, and the `calls` of CUDA kernels.

    Raises:
        UserError: nothing is known of the architecture, or the kernels can't be compiled.
    """
    if arch not in GPUS:
        raise unknown_name("architecture with known rates", arch, GPUS)
    asked = []
    for name, op in operations().items():
        shapes = [_counted(name, shape) for shape in op.shapes.get("cuda", ())[:_MOST_SHAPES]]
        asked += list_cases([name], list(dict.fromkeys(shapes)), [DTYPE]) if name in SHAPES else []
    return {"gpu": GPUS[arch], "calls": dict(_call(count) for count in count_all(asked, arch))}


def _call(count: Count) -> tuple[str, dict[str, Any]]:
    """Its name, and its `seconds`, if each kernel takes as long as its limiter; `bytes` by formula; and the `limiter`
    of the longest kernel."""
    longest = [(max(times(count.arch, launch).values()), limiter(count.arch, launch)) for launch in count.launches]
    told = {"seconds": sum(seconds for seconds, _ in longest), "bytes": count.floor, "limiter": max(longest)[1]}
    return f"{count.op}, {count.shape}, {count.direction}", told


def _counted(op: str, shape: str) -> str:
    """The shape that stands for this one: of an optimizer, whose tensors are alike, one for all."""
    return OPTIMIZED[0] if SHAPES.get(op) == OPTIMIZED else re.sub(r" b\d+", " b1", shape)


def prediction(bundle: str, case: Case) -> dict[str, Any] | None:
    """The `ms` that the CUDA kernels take for a case by prediction, their `limiter`, and the `gpu` that is meant; None
    where the bundle, a folder or empty, has no prediction of it."""
    path = Path(bundle) / FILE
    if not bundle or not path.is_file() or case.dtype.itemsize != 2:
        return None
    stored, shape = json.loads(path.read_text()), _counted(case.op.name, case.shape.name)
    calls = [stored["calls"].get(f"{case.op.name}, {shape}, {way}") for way in _DIRECTIONS[case.mode]]
    if not all(calls):
        return None
    work = case.op.work(case.shape, case.dtype.itemsize)
    costs = [cost for cost in (work.forward, work.backward) if cost][: len(calls)]
    seconds = [call["seconds"] * cost.bytes / call["bytes"] for call, cost in zip(calls, costs, strict=True)]
    longest = calls[seconds.index(max(seconds))]
    return {"ms": 1e3 * sum(seconds), "limiter": longest["limiter"], "gpu": stored["gpu"]}


if __name__ == "__main__":
    write_text(Path(sys.argv[2]), json.dumps(predict(sys.argv[1]), indent=1) + "\n")
