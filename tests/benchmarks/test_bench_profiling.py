"""Traces of this processor, and the call for ncu."""

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from bench_fakes import registered, tanh_operation

from benchmarks.candidates import Candidate, candidates
from benchmarks.measure import Case
from benchmarks.operation import Operation
from benchmarks.profiling import main, profile_case
from benchmarks.shapes import parse_shape

SHAPE = "eva02-b16@224 b1"


def a_case(op: Operation, mode: str = "training", device: str = "cpu") -> tuple[Case, Candidate]:
    """A case, and plain PyTorch on it."""
    case = Case(op, parse_shape(SHAPE), mode, torch.float32, torch.device(device))
    return case, next(one for one in candidates(op, device)[0] if one.kind == "baseline")


def events(path: Path) -> list[dict[str, Any]]:
    """The events of a trace."""
    trace: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return list(trace["traceEvents"])


def test_the_trace_holds_the_range_and_what_ran_in_it(tmp_path: Path) -> None:
    case, candidate = a_case(tanh_operation())
    path = profile_case(case, candidate, tmp_path / "traces")
    assert path == tmp_path / "traces" / "tanh-torch_eager-eva02-b16@224_b1-training-float32.json.gz"
    assert [path] == list(path.parent.iterdir())
    found = events(path)
    ranges = [one for one in found if one.get("name") == "tanh: torch eager"]
    assert len(ranges) == 3
    for name in ("aten::tanh", "aten::tanh_backward"):
        starts = [one["ts"] for one in found if one.get("name") == name]
        assert len(starts) == 3
        assert all(span["ts"] <= at <= span["ts"] + span["dur"] for span, at in zip(ranges, starts, strict=True))


def test_ncu_main_makes_one_call_after_warming_up() -> None:
    log: list[str] = []

    def ours(x: torch.Tensor) -> torch.Tensor:
        log.append("call")
        return x.tanh()

    with registered(tanh_operation(ours=ours)):
        main(["tanh", SHAPE, "forward", "float32", "evakernels"], device="cpu")
    assert log == ["call"] * 4  # three of them for warming up
