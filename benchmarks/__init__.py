"""What every op costs: against its peers, against this machine's roofline, and against float64.

`python -m benchmarks list` shows what can be measured. A file of one's own can add a candidate:

    from benchmarks import peer

    @peer("layer_norm", "mine")
    def build(shape):
        from my_kernels import fast_norm

        return lambda x, weight, bias: fast_norm(x, weight, bias, 1e-6)

and `python -m benchmarks op layer_norm --plugin that_file.py` measures it beside the others.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# First of all: it decides where later imports find evakernels and evaclip.
from benchmarks import origin

origin.choose()

if TYPE_CHECKING:
    from benchmarks.operation import Cost, Draw, Operation, Work, peer, register
    from benchmarks.shapes import Shape

__all__ = ["Cost", "Draw", "Operation", "Shape", "Work", "peer", "register"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: what supervises a GPU's checks shall neither wait for torch nor hold it.
    if name not in __all__:
        raise AttributeError(f"module 'benchmarks' has no attribute {name!r}")
    return getattr(import_module("benchmarks.shapes" if name == "Shape" else "benchmarks.operation"), name)
