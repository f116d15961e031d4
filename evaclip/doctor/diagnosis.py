"""What is installed and what works, for people and for programs."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaclip.extras import requirements
from evaclip.machine import version_of

Facts = dict[str, Any]

_REBUILD = "pip install --force-reinstall --no-deps --no-build-isolation SOURCE_FOLDER"


def diagnose() -> Facts:
    """All that is known, as plain values that JSON can hold.

    Returns:
        What `evakernels.info()` returns, and None for any of these where there is nothing to tell:
        `cuda["driver"]`: its version. `cuda["capabilities"]`: those of the GPUs.
        `cuda["error"]`: why torch can't use the GPUs that are there.
        `machine`: see `evaclip.machine.machine`.
        `packages`: by extra, "" for the core, the version of each package, None where it is missing.
        `ops`: for each op its `family` and, for each backend, its `state` ("live", "usable", "unable", "fails") with
            the `reasons`.
        `problems`: for each thing that is there but doesn't work, `what` it is, the `fix`, and the `backend` that is
            chosen all the same and fails.
    """
    from evaclip.machine import machine
    from evakernels import info

    facts: Facts = {"problems": [], "machine": machine(), **info()}
    facts["cuda"] |= {"driver": _driver(), "capabilities": _capabilities(), "error": _cuda_error()}
    facts["packages"] = {extra: {name: version_of(name) for name in names} for extra, names in requirements().items()}
    facts["problems"] = list(problems(facts))
    facts["ops"] = op_states({p["backend"]: p["what"] for p in facts["problems"] if p["backend"]})
    return facts


def problems(facts: Facts) -> Iterator[dict[str, str | None]]:
    """What is there but doesn't work; `facts` is what `diagnose` returns, of which `ops` isn't read."""
    native, cuda = facts["native"], facts["cuda"]

    def problem(what: str, fix: str, backend: str | None = None) -> dict[str, str | None]:
        return {"what": what, "fix": fix, "backend": backend}

    missing = [name for name, version in facts["packages"].get("", {}).items() if version is None]
    if missing:
        yield problem(f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    if not native["loaded"] and (native["built"] or not native["reason"].startswith("not built")):
        yield problem(f"the compiled library: {native['reason']}", f"build it for this torch: {_REBUILD}")
    elif native["module_error"]:
        yield problem(f"evakernels._C can't be imported: {native['module_error']}", f"build it again: {_REBUILD}")
    if native["isa_error"]:
        yield problem(native["isa_error"], "unset EVAKERNELS_ISA, or let it name one that is available", "cpu")
    if cuda["error"]:
        fix = f"update the driver, or install a torch for an older CUDA than {cuda['version']}"
        yield problem(f"torch can't use the GPU: {cuda['error']}", fix)
    archs = native.get("cuda_archs", [])
    unserved = [c for c in cuda["capabilities"] if archs and not _serves(archs, c)]
    if unserved:
        wanted = ";".join(dict.fromkeys(capability.replace(".", "") for capability in unserved))
        what = f"the kernels for GPUs are built for {', '.join(archs)}, not for {wanted}, which is here"
        yield problem(what, f"EVAKERNELS_CUDA_ARCHS='{wanted}' {_REBUILD}", "cuda")


def op_states(broken: dict[str, str]) -> dict[str, Facts]:
    """For each op its family and the state of each backend; `broken` says of a backend why its calls fail."""
    from evakernels.backends import PREFERENCE, family, ops, why_not

    states: dict[str, Facts] = {}
    for op in ops():
        backends: dict[str, Facts] = {}
        for backend in PREFERENCE:
            reasons = why_not(op, backend)
            taken = any(other["state"] != "unable" for other in backends.values())
            if reasons:
                state = "unable"
            elif backend in broken:
                state, reasons = "fails", [broken[backend]]
            else:
                state = "usable" if taken else "live"
            backends[backend] = {"state": state, "reasons": reasons}
        states[op] = {"family": family(op), "backends": backends}
    return states


def _serves(archs: list[str], capability: str) -> bool:
    """Whether code for these compute capabilities runs on a GPU: that of its generation, or PTX of the last one."""
    numbers = [int(found[0]) for arch in archs if (found := re.match(r"\d+", arch))]
    if len(numbers) < len(archs):
        return True  # such as "native": nothing can be told
    own = int(capability.replace(".", ""))
    return numbers[-1] <= own or any(number // 10 == own // 10 and number <= own for number in numbers)


def _driver(told_by: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of NVIDIA's driver, as its kernel module tells it."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", told_by.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found and found[0]


def _capabilities() -> list[str]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [".".join(map(str, torch.cuda.get_device_capability(index))) for index in range(count)]


def _cuda_error(devices: Path = Path("/dev")) -> str | None:
    """Why torch, built for CUDA, can't use the GPUs that the system shows."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    there = any(devices.glob("nvidia[0-9]*"))
    if torch.version.cuda is None or torch.cuda.is_available() or hidden or not there:
        return None
    try:
        torch.cuda.init()
    except RuntimeError as exc:
        return " ".join(str(exc).split())
    return "it doesn't say why"
