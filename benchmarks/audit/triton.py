"""What the Triton kernels move and multiply, counted in Triton's interpreter in a process of its own.

    python -m benchmarks.audit.triton '[["layer_norm", "eva02-b16@224 b1", "bfloat16", "forward"]]'

prints rows as JSON; `count_all` starts it. Loads and stores are counted by byte, in all and each byte once a kernel:
the first is what caches serve, the second what memory must move. Sums over programs and copies that PyTorch makes
around a kernel aren't counted.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from typing import Any

import torch

import benchmarks.cases  # noqa: F401  (registers the operations)
import evakernels
from benchmarks import accuracy
from benchmarks.audit.budget import ROOT
from benchmarks.audit.build import Case
from benchmarks.operation import Draw, Operation, get_operation
from benchmarks.shapes import Shape, parse_shape
from benchmarks.suite import DTYPES
from evaclip.errors import UserError

_ROWS = ("eva02-b16@224 b1",)
_PATCHES = ("eva02-l14@224 b1", "eva01-g14@224 b1")
"""257 tokens in heads of 64 and of 88 channels."""
_PAIRS = ("eva02-b16@224 b512",)
_TEXT = ("eva02-b16:text b2",)

NOT_KEPT = "clip_loss, logits not kept"
SHAPES: Mapping[str, Sequence[str]] = {
    "layer_norm": _ROWS,
    "add_layer_norm": _ROWS,
    "layer_norm_add": _ROWS,
    "silu_mul": _ROWS,
    "swiglu": _ROWS,
    "token_dropout": ("eva02-b16@224 b8 drop50",),
    "rope_attention": _PATCHES,
    "causal_attention": _TEXT,
    "packed_attention": _TEXT,
    "clip_loss": _PAIRS,
    NOT_KEPT: _PAIRS,
    "siglip_loss": _PAIRS,
}
"""The operations with Triton kernels, and the shapes that are usual for each: the interpreter is slow."""
DTYPE = "bfloat16"

_PRODUCTS = {
    "forward_kernel": 2,
    "query_kernel": 3,
    "key_kernel": 4,
    "statistics_kernel": 1,
    "gradient_kernel": 1,
    "siglip_kernel": 1,
}
"""The matrix products that a kernel makes, over all tokens or all pairs of features."""


@dataclass(frozen=True)
class Row:
    """One kernel of one call, all its launches together.

    Attributes:
        op, shape, dtype, direction: of the call.
        kernel: name of the function.
        programs: how many there are; the interpreter plays a GPU of three multiprocessors.
        loaded, stored: bytes of all accesses.
        once: different bytes loaded and different bytes stored.
        floor: bytes that the call needs by formula, each input read once and each output written once.
        again: for each argument that is read more than once, how often; one read of each comes from memory, and the
            others from the L2 cache.
        useful: multiplications by formula over those that are made; those with a lone class token, which are sums
            and no product of matrices, count as needed only. None where there is none.
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
    again: dict[str, float]
    useful: float | None


def traffic(rows: Sequence[Row]) -> float:
    """Of the kernels of one call: different bytes of each over the bytes by formula."""
    return sum(row.once for row in rows) / rows[0].floor


def list_cases(
    names: Sequence[str] = (), shapes: Sequence[str] = (), dtypes: Sequence[str] = (), directions: Sequence[str] = ()
) -> list[Case]:
    """All cases that are asked for; of everything that isn't named, what is usual."""
    return [
        (name, shape, dtype, direction)
        for name in names or SHAPES
        for shape in [parse_shape(shape).name for shape in shapes] or SHAPES[name]
        for dtype in dtypes or (DTYPE,)
        for direction in directions or ("forward", "backward")
    ]


def operation(name: str) -> Operation:
    """The operation of a name in `SHAPES`."""
    if name == NOT_KEPT:
        return replace(get_operation("clip_loss"), name=name, ours=partial(evakernels.clip_loss, memory_budget=0))
    return get_operation(name)


def count_all(cases: Sequence[Case]) -> list[Row]:
    """A row for each kernel of each case, counted in a process that interprets.

    Raises:
        UserError: Triton is not installed, or a case failed.
    """
    if find_spec("triton") is None:
        raise UserError("the Triton kernels are counted in its interpreter, and triton is not installed")
    call = [sys.executable, "-m", "benchmarks.audit.triton", json.dumps(cases)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    result = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"counting in Triton's interpreter failed: {result.stderr[-3000:]}")
    return [Row(**row) for row in json.loads(result.stdout)]


def count(name: str, shape_name: str, dtype: str, directions: Sequence[str]) -> list[Row]:
    """The rows of the cases of one call, which is interpreted once; needs TRITON_INTERPRET=1."""
    from evakernels.triton import contrastive
    from evakernels.triton._counting import counting

    contrastive.MIN_CHUNK = 2048  # as on a GPU; the interpreter's own is for tests of several chunks
    op, shape = operation(name), parse_shape(shape_name)
    work = op.work(shape, DTYPES[dtype].itemsize)
    inputs = op.inputs(shape, Draw(DTYPES[dtype], torch.device("cpu"), torch.Generator().manual_seed(0)))
    leaves = [leaf.requires_grad_() for leaf in accuracy.gradient_leaves(op, inputs)]
    launches = {}
    with evakernels.use_backend("triton"):
        with counting() as launches["forward"]:
            outputs = accuracy.tensors(op.ours(**inputs))
        if "backward" in directions:
            upstream = [torch.randn_like(output) for output in outputs]
            with counting() as launches["backward"]:
                torch.autograd.grad(outputs, leaves, upstream)
    rows = []
    for direction in directions:
        cost = work.forward if direction == "forward" else work.backward
        assert cost is not None
        for kernel in dict.fromkeys(launch.kernel for launch in launches[direction]):
            of_kernel = [one for one in launches[direction] if one.kernel == kernel]
            rows.append(_row((name, shape_name, dtype, direction), of_kernel, cost.bytes, _product(op, shape)))
    return rows


def _product(op: Operation, shape: Shape) -> float:
    """Operations of one matrix product over all tokens or pairs."""
    products = 2 if "attention" in op.name else 1
    return op.work(shape, 1).forward.flops / products


def _row(case: Case, launches: Sequence[Any], floor: float, product: float) -> Row:
    kernel = launches[0].kernel
    tensors = [(name, one) for launch in launches for name, one in launch.tensors.items()]
    again = {name: round(one.loaded / one.loaded_once, 1) for name, one in tensors if one.loaded > one.loaded_once > 0}
    programs, loaded, stored, once = (
        sum(getattr(one, what) for one in launches) for what in ("programs", "loaded", "stored", "bytes_once")
    )
    flops = sum(launch.flops for launch in launches)
    useful = _PRODUCTS[kernel] * product / flops if flops else None
    return Row(*case, kernel, programs, loaded, stored, once, floor, again, useful)


if __name__ == "__main__":
    calls = groupby(json.loads(sys.argv[1]), key=lambda case: case[:3])
    counted = [count(name, shape, dtype, [case[3] for case in cases]) for (name, shape, dtype), cases in calls]
    print(json.dumps([asdict(row) for rows in counted for row in rows]))
