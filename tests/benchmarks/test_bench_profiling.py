"""Traces of this processor, and the call for ncu."""

import gzip
import json
from pathlib import Path

import torch
from bench_fakes import CPU, registered, tanh_operation

from benchmarks.candidates import candidates
from benchmarks.measure import Case
from benchmarks.profiling import main, profile_case
from benchmarks.shapes import parse_shape

SHAPE = "eva02-b16@224 b1"


def test_trace_holds_the_range_and_its_operators(tmp_path: Path) -> None:
    case = Case(tanh_operation(), parse_shape(SHAPE), "training", torch.float32, CPU)
    candidate = next(one for one in candidates(case.op, "cpu")[0] if one.kind == "baseline")
    path = profile_case(case, candidate, tmp_path / "traces")
    assert path == tmp_path / "traces" / "tanh-torch_eager-eva02-b16@224_b1-training-float32.json.gz"
    found = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
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
