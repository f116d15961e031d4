"""Measures launch configurations and backends on this machine's GPU, and writes this GPU's file.

python -m evakernels.tuning run --op layer_norm_backward
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from .. import names, tuning


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 on success, 2 where nothing can be measured."""
    if find_spec("triton") is None:
        print("triton is not installed, and its kernels' files have the configurations", file=sys.stderr)
        return 2
    choices = sorted(tuning.shipped()[min(tuning.shipped())])
    parser = argparse.ArgumentParser(prog="python -m evakernels.tuning", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run"])
    parser.add_argument("--op", action="append", metavar="OP", help="default: all")
    ops = parser.parse_args(argv).op or choices
    for op in ops:
        if op not in choices:
            parser.error(f"argument --op: {names.unknown('op', op, choices)}")
    if not torch.cuda.is_available():
        print("configurations are chosen by time, and nothing can be measured: there is no GPU here", file=sys.stderr)
        return 2
    run(ops)
    return 0


def run(ops: Sequence[str]) -> None:
    """Measures the ops one by one; each result is written at once, in case a later op fails."""
    from . import search

    gpu, capability = tuning.find_gpu(torch.empty(0, device="cuda"))
    for op in ops:
        entries = search.tuned(op, tuning.table(gpu, capability)[op], search.median_time)
        search.write(gpu, {op: entries}, capability)
        times = search.timed(op, entries, search.median_time)  # with the configurations just written
        path = search.write(gpu, {tuning.ORDER + op: search.order(times)}, capability)
        for entry, microseconds in zip(entries, times, strict=True):
            print(op, entry["shape"], entry["config"], microseconds, flush=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
