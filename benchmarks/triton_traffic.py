"""What the Triton kernels move and multiply, counted in Triton's interpreter: a prediction for machines without a GPU.

    python -m benchmarks.triton_traffic layer_norm --shape "eva02-b16@224 b1" --dtype bfloat16

Loads and stores are counted by byte, in all and each byte once; the first is what the caches serve, the second what
memory must move. Sums over programs and copies that PyTorch makes around a kernel aren't counted.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import benchmarks.cases  # noqa: F401  (registers the operations)
import evakernels
from benchmarks import accuracy
from benchmarks.operation import Cost, Draw, get_operation
from benchmarks.shapes import parse_shape
from benchmarks.suite import DTYPES
from evaclip.errors import UserError

Case = tuple[str, str, str, str]
"""Names of an op, a shape, a dtype, and `forward` or `backward`."""


@dataclass(frozen=True)
class Row:
    """One kernel of one call.

    Attributes:
        op, shape, dtype, direction: of the call.
        kernel: name of the function.
        programs: how many there are; the interpreter plays a GPU of three multiprocessors.
        loaded, stored: bytes of all accesses.
        once: different bytes loaded and different bytes stored.
        floor: bytes that the call needs by formula, each input read once and each output written once.
        traffic: `once` of all kernels of the call over `floor`.
        useful: share of the call's matrix products that is needed by formula; None where there is none.
    """

    op: str
    shape: str
    dtype: str
    direction: str
    kernel: str
    programs: int
    loaded: int
    stored: int
    once: int
    floor: float
    traffic: float
    useful: float | None


def count_all(cases: Sequence[Case]) -> list[Row]:
    """A row for each kernel of each case, counted in a process that interprets.

    Raises:
        UserError: a case failed.
    """
    call = [sys.executable, "-m", "benchmarks.triton_traffic", "--cases", json.dumps(cases)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    result = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"counting in Triton's interpreter failed: {result.stderr[-3000:]}")
    return [Row(**row) for row in json.loads(result.stdout)]


def count(op_name: str, shape_name: str, dtype: str, direction: str) -> list[Row]:
    """The rows of one case; needs TRITON_INTERPRET=1."""
    from evakernels.triton._counting import counting

    op, shape = get_operation(op_name), parse_shape(shape_name)
    work = op.work(shape, DTYPES[dtype].itemsize)
    inputs = op.inputs(shape, Draw(DTYPES[dtype], torch.device("cpu"), torch.Generator().manual_seed(0)))
    with evakernels.use_backend("triton"):
        if direction == "forward":
            cost = work.forward
            with torch.no_grad(), counting() as launches:
                op.ours(**inputs)
        else:
            assert work.backward is not None
            cost = work.backward
            leaves = [leaf.requires_grad_() for leaf in accuracy.gradient_leaves(op, inputs)]
            outputs = accuracy.tensors(op.ours(**inputs))
            upstream = [torch.randn_like(output) for output in outputs]
            with counting() as launches:
                torch.autograd.grad(outputs, leaves, upstream)
    traffic, useful = _shares(cost, sum(one.bytes_once for one in launches), sum(one.flops for one in launches))
    case = op_name, shape_name, dtype, direction
    return [
        Row(*case, one.kernel, one.programs, one.loaded, one.stored, one.bytes_once, cost.bytes, traffic, useful)
        for one in launches
    ]


def _shares(cost: Cost, bytes_once: int, flops: int) -> tuple[float, float | None]:
    return bytes_once / cost.bytes, cost.flops / flops if flops else None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_traffic", description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="operations, as `python -m benchmarks list` names them"
    )
    parser.add_argument("--shape", default="eva02-b16@224 b1", help="default: %(default)s")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--cases", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.cases is not None:
        print(json.dumps([asdict(row) for case in arguments.cases for row in count(*case)]))
        return
    cases = []
    for name in arguments.names:
        directions = ("forward", "backward") if get_operation(name).gradients else ("forward",)
        cases += [(name, arguments.shape, arguments.dtype, direction) for direction in directions]
    print(f"{'op':24}{'kernel':28}{'loaded':>12}{'stored':>12}{'once':>12}{'floor':>12}{'traffic':>9}{'useful':>8}")
    for row in count_all(cases):
        useful = "" if row.useful is None else f"{row.useful:.0%}"
        sizes = "".join(f"{size:12,.0f}" for size in (row.loaded, row.stored, row.once, row.floor))
        print(f"{row.op + ' ' + row.direction:24}{row.kernel:28}{sizes}{row.traffic:9.3f}{useful:>8}")


if __name__ == "__main__":
    main()
