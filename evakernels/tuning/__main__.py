"""Launch configurations of the Triton kernels: shows what is shipped, or measures on this machine's GPU.

python -m evakernels.tuning show
python -m evakernels.tuning run --op layer_norm_backward
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch

from .. import names, tuning


def main(argv: Sequence[str] | None = None) -> int:
    """0 on success, 2 where nothing can be measured."""
    if find_spec("triton") is None:
        print("triton is not installed, and its kernels' files have the configurations", file=sys.stderr)
        return 2
    known = sorted(tuning.shipped()[min(tuning.shipped())])
    parser = argparse.ArgumentParser(prog="python -m evakernels.tuning", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in (("show", "print the shipped configurations"), ("run", "measure, and write this GPU's file")):
        command = commands.add_parser(name, help=help)
        command.add_argument("--op", action="append", type=_known(known), metavar="OP", help="default: all")
    arguments = parser.parse_args(argv)
    ops = arguments.op or known
    return show(ops) if arguments.command == "show" else run(ops)


def _known(ops: Sequence[str]) -> Callable[[str], str]:
    def op(name: str) -> str:
        if name not in ops:
            raise argparse.ArgumentTypeError(names.unknown("op", name, ops))
        return name

    return op


def show(ops: Sequence[str]) -> int:
    rows = [("GPU", "op", "shape", "configuration")]
    tables = {f"sm_{capability}": entries for capability, entries in tuning.shipped().items()}
    tables |= {path.stem: tuning.read(path) for path in sorted(tuning.FOLDER.glob("*.json"))}
    for gpu, ops_of_gpu in tables.items():
        for op, entries in ops_of_gpu.items():
            pairs = [
                [" ".join(f"{k}={v}" for k, v in entry[part].items()) for part in ("shape", "config")]
                for entry in entries
            ]
            rows += [(gpu, op, shape, config) for shape, config in pairs if op in ops]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def run(ops: Sequence[str]) -> int:
    if not torch.cuda.is_available():
        print("configurations are chosen by time, and nothing can be measured: there is no GPU here", file=sys.stderr)
        return 2
    from . import search

    gpu, capability = tuning.gpu_of(torch.empty(0, device="cuda"))
    found = {}
    for op in ops:
        found[op] = search.tuned(op, tuning.table(gpu, capability)[op], search.median_time)
        for entry in found[op]:
            print(op, entry["shape"], entry["config"], flush=True)
        path = search.write(gpu, found, capability)  # what is found stays, should a later op fail
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
