"""What every op costs: against its peers, against this machine's roofline, and against float64.

`python -m benchmarks list` shows what can be measured. A file of one's own can add a candidate:

    from benchmarks import peer

    @peer("layer_norm", "mine")
    def build(shape):
        from my_kernels import fast_norm

        return lambda x, weight, bias: fast_norm(x, weight, bias, 1e-6)

and `python -m benchmarks op layer_norm --plugin that_file.py` measures it beside the others.
"""

# First of all: it decides where the imports after it find evakernels and evaclip.
from benchmarks import origin

origin.choose()

from benchmarks.operation import Cost, Draw, Operation, Work, peer, register  # noqa: E402
from benchmarks.shapes import Shape  # noqa: E402

__all__ = ["Cost", "Draw", "Operation", "Shape", "Work", "peer", "register"]
