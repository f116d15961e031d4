"""A result with everything that a report has to show: modes, dtypes, batches, token counts, a failure, peers, notes."""

from typing import Any

from bench_fakes import machine, row

from benchmarks.results import Results, Row
from benchmarks.shapes import parse_shape

SHAPES = ("eva02-b16@224 b1", "eva02-b16@224 b4", "eva02-b16@224 b4 drop50", "eva02-l14:text b2")
FAILURE = "RuntimeError: no kernel for <head_dim> 64 & more"
SPEEDS = {
    "evakernels cpu": 0.5,
    "evakernels reference": 4.0,
    "torch eager": 1.0,
    "torch.compile": 0.8,
    "some peer": 1.1,
}
"""Time of each candidate relative to plain PyTorch."""


def results(**changes: Any) -> Results:
    """Two operations, one of them with matrix products and without kernels of this library that are compiled."""
    rows = [
        candidate
        for op in ("layer_norm", "rope_attention")
        for shape in SHAPES
        for dtype in ("float32", "bfloat16")
        for mode in ("forward", "training")
        for candidate in contest(op, shape, dtype, mode)
    ]
    notes = ["busy: other processes used 40% of the processors during the run"]
    facts = {"versions": {"torch": "2.99"}, "date": "2026-01-02T03:04:05+00:00", "commit": "abcdef123456"}
    where = machine(notes=notes, command="python -m benchmarks all", **facts)
    options: dict[str, Any] = {"machine": where, "rows": rows, "absent": {"far <away>": "runs on cuda only"}}
    return Results(**(options | changes))


def contest(op: str, shape: str, dtype: str, mode: str) -> list[Row]:
    """The rows of one case; plain PyTorch takes 0.1 ms for each image and mode, the others as `SPEEDS` says."""
    sizes = parse_shape(shape)
    eager = 0.1 * sizes.batch * sizes.tokens / 197 * (3 if mode == "training" else 1)
    flops = 1e4 * sizes.batch * sizes.tokens if op == "rope_attention" else 0.0
    rows = []
    for candidate, share in SPEEDS.items():
        if op == "rope_attention" and candidate == "evakernels cpu":
            continue
        failed = op == "rope_attention" and mode == "training" and candidate == "some peer"
        median = eager * share
        rows.append(
            row(
                op=op,
                mode=mode,
                shape=shape,
                dtype=dtype,
                candidate=candidate,
                kind={"evakernels": "ours", "torch": "baseline"}.get(candidate.split(" ")[0], "peer"),
                sizes={"batch": sizes.batch, "tokens": sizes.tokens},
                samples_ms=[] if failed else [[median * factor for factor in (0.9, 0.95, 1.0, 1.05, 1.1)]],
                flops=flops,
                bytes=1e5 * sizes.batch,
                floor_ms=eager / 4,
                first_call_ms=None if failed else 123.0,
                peak_bytes=None if failed else round(2**20 * sizes.batch * share),
                saved_bytes=2**19 * sizes.batch if mode == "training" and not failed else None,
                error=None if failed else 1e-6 * share,
                baseline_error=1e-6,
                failure=FAILURE if failed else None,
            )
        )
    return rows
