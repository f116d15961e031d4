"""Runs the program that drives the launchers on what nvcc made of the kernels.

LD_PRELOAD=allocations.so python tests/cuda/drive.py LIBRARY CAPABILITY [FAMILY ...]
"""

import ctypes
import gc
import os
import sys

from ptx_interpreter.runtime import Launches


def with_planted_fault(ptx: str) -> str:
    """PTX in which the fault of that number strikes, none if there is no number."""
    return ptx.replace("PLANTED_FAULT", os.environ.get("EVAKERNELS_PLANTED", "0"))


if __name__ == "__main__":
    gc.disable()  # of the many objects that kernels are read into none is garbage
    library, capability, *families = sys.argv[1:]
    names = [argument.encode() for argument in (library, *families)]
    with Launches(library, int(capability), edit=with_planted_fault, count=False):
        sys.exit(ctypes.CDLL(library).main(len(names), (ctypes.c_char_p * len(names))(*names)))
