"""Which evakernels is measured: that of this checkout, or one that is installed."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAG = "--installed"


def choose() -> None:
    """Has evakernels and evaclip imported from where they are installed, not from this checkout.

    `python -m benchmarks` has Python look into the checkout first. So it stays if the checkout is compiled, unless
    `FLAG` is among the arguments, and if no other evakernels is installed. Must come before anything imports either.
    """
    compiled = (ROOT / "evakernels" / "_ops.so").exists()
    if "evakernels" in sys.modules or (compiled and FLAG not in sys.argv):
        return
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    if PathFinder.find_spec("evakernels", elsewhere) is not None:
        sys.path[:] = elsewhere


def is_checkout() -> bool:
    """Whether the evakernels that is imported is that of this checkout."""
    return _file().parent.parent == ROOT


def describe() -> str:
    """The file that evakernels came from, its version, and what is compiled."""
    import evakernels

    where = f"{_file().relative_to(ROOT)} of this checkout" if is_checkout() else str(_file())
    native = evakernels.info()["native"]
    state = f"compiled, {native['isa']}" if native["loaded"] else "not compiled"
    return f"{where}, {evakernels.__version__}, {state}"


def warning() -> str | None:
    """What must be said of a run without the compiled library; None where there is one."""
    import evakernels

    native = evakernels.info()["native"]
    if native["loaded"]:
        return None
    return f"NO COMPILED LIBRARY ({native['reason']}): evakernels is measured on its references, and on a GPU on Triton"


def _file() -> Path:
    import evakernels

    return Path(evakernels.__file__).resolve()
