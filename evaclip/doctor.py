"""`evaclip doctor`: installed packages, live backends, and fixes for defects. Needs nothing but the core packages."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

from evaclip.extras import install_command, requirements
from evaclip.machine import SPIN_COUNT

Facts = dict[str, Any]

_MARKS = {"live": "*", "usable": "o", "unable": "-", "fails": "x"}
_MEANINGS = {"live": "live", "usable": "usable, not first", "unable": "unable", "fails": "calls fail"}
_TITLE_WIDTH = 12
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_REBUILD = "pip install --force-reinstall --no-deps --no-build-isolation SOURCE_FOLDER"


def diagnose() -> Facts:
    """Describe the installation by values that JSON can hold.

    Returns:
        The entries of `evakernels.info()`, and:
        `cuda`: also `driver` (version), `capabilities` (one a GPU), `error` (why torch can't use a GPU that is there);
            None for an unknown value.
        `machine`: see `evaclip.machine.machine`.
        `threads`: the `count` of OpenMP threads, and OMP_WAIT_POLICY and GOMP_SPINCOUNT, None if not set.
        `packages`: by extra, "" for the core, the version of each package, None if it is missing.
        `ops`: by op, its `family` and, by backend, the `state` ("live", "usable", "unable", "fails") and `reasons`.
        `problems`: for each defect, the text `what`, its `fix`, and the `backend` with failing calls, or None.
    """
    from evaclip.machine import machine, version_of
    from evakernels import info

    facts: Facts = {"problems": [], "machine": machine(), "threads": _threads(), **info()}
    facts["cuda"] |= {"driver": _driver_version(), "capabilities": _capabilities(), "error": _cuda_error()}
    facts["packages"] = {extra: {name: version_of(name) for name in names} for extra, names in requirements().items()}
    facts["problems"] = list(find_problems(facts))
    facts["ops"] = op_states({p["backend"]: p["what"] for p in facts["problems"] if p["backend"]})
    return facts


def find_problems(facts: Facts) -> Iterator[dict[str, str | None]]:
    """Yield the defects that `facts`, the result of `diagnose`, show; `facts["ops"]` isn't read."""
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
    unsupported = [c for c in cuda["capabilities"] if archs and not _runs_on(archs, c)]
    if unsupported:
        wanted = ";".join(dict.fromkeys(capability.replace(".", "") for capability in unsupported))
        what = f"the CUDA kernels are built for {', '.join(archs)}, but this machine's GPU is {wanted}"
        yield problem(what, f"EVAKERNELS_CUDA_ARCHS='{wanted}' {_REBUILD}", "cuda")


def op_states(broken: dict[str, str]) -> dict[str, Facts]:
    """Return the family of each op and the state of each backend; `broken` maps a backend to why its calls fail."""
    from evakernels.backends import PREFERENCE, family, ops, unsupported_reasons

    states: dict[str, Facts] = {}
    for op in ops():
        backends: dict[str, Facts] = {}
        for backend in PREFERENCE:
            reasons = unsupported_reasons(op, backend)
            if reasons:
                state = "unable"
            elif backend in broken:
                state, reasons = "fails", [broken[backend]]
            else:
                is_first = all(other["state"] == "unable" for other in backends.values())
                state = "live" if is_first else "usable"
            backends[backend] = {"state": state, "reasons": reasons}
        states[op] = {"family": family(op), "backends": backends}
    return states


def render(facts: Facts, width: int) -> str:
    """Format the result of `diagnose` for a terminal of `width` columns, in ASCII."""
    parts = [
        _rows((("broken", f"{p['what']}; fix: {p['fix']}") for p in facts["problems"]), width),
        _rows(_system_rows(facts), width),
        _matrix(facts["ops"], width),
        _rows(_reason_rows(facts["ops"]), width),
        _rows((("missing", text) for text in _missing(facts["packages"])), width),
    ]
    return "\n\n".join(part for part in parts if part)


def _runs_on(archs: list[str], capability: str) -> bool:
    """Whether kernels of these architectures run on a GPU: code of its generation, or the PTX of the last one."""
    numbers = [int(match[0]) for arch in archs if (match := re.match(r"\d+", arch))]
    if len(numbers) < len(archs):
        return True  # an unknown architecture, such as "native"
    gpu = int(capability.replace(".", ""))
    return numbers[-1] <= gpu or any(number // 10 == gpu // 10 and number <= gpu for number in numbers)


def _driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    try:
        match = re.search(r"\d+\.\d+(\.\d+)?", path.read_text(encoding="utf-8"))
    except OSError:
        return None
    return match and match[0]


def _capabilities() -> list[str]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [".".join(map(str, torch.cuda.get_device_capability(index))) for index in range(count)]


def _threads() -> Facts:
    import torch

    return {"count": torch.get_num_threads(), **{name: os.environ.get(name) for name in _WAITING}}


def _cuda_error(devices: Path = Path("/dev")) -> str | None:
    """Return why torch, built for CUDA, can't use the GPUs that the system shows; None if it can or there are none."""
    import torch

    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    has_gpu = any(devices.glob("nvidia[0-9]*"))
    if torch.version.cuda is None or torch.cuda.is_available() or is_hidden or not has_gpu:
        return None
    try:
        torch.cuda.init()
    except RuntimeError as exc:
        return " ".join(str(exc).split())
    return "unknown reason"


def _system_rows(facts: Facts) -> list[tuple[str, str]]:
    machine, triton = facts["machine"], facts["triton"] or "not installed (needed for kernels on GPUs only)"
    return [
        ("machine", f"{machine['processor']}, {machine['cores']} cores; instruction set {_isa_state(facts['native'])}"),
        ("threads", _thread_state(facts["threads"], machine["cores"])),
        ("GPU", _cuda_state(facts["cuda"])),
        ("evakernels", f"{facts['evakernels'] or 'not installed'}; native library {_native_state(facts['native'])}"),
        ("Python", f"{facts['python']}, torch {facts['torch']}, triton {triton}"),
    ]


def _matrix(ops: dict[str, Facts], width: int) -> str:
    """Format a row for each family; where its ops differ, a cell has the marks of all their states."""
    cells: dict[str, dict[str, dict[str, None]]] = {}
    for op in ops.values():
        for backend, verdict in op["backends"].items():
            cells.setdefault(op["family"], {}).setdefault(backend, {})[_MARKS[verdict["state"]]] = None
    size, columns = max(map(len, cells)), list(next(iter(cells.values())))
    lines = [" ".join([" " * size, *(f"{column:^9}" for column in columns)])]
    lines += [
        " ".join([f"{name:<{size}}", *(f"{''.join(cell):^9}" for cell in cells[name].values())]) for name in cells
    ]
    states = {verdict["state"] for op in ops.values() for verdict in op["backends"].values()}
    lines.append(fill("   ".join(f"{_MARKS[state]} {_MEANINGS[state]}" for state in _MARKS if state in states), width))
    return "\n".join(line.rstrip() for line in lines)


def _reason_rows(ops: dict[str, Facts]) -> Iterator[tuple[str, str]]:
    """Yield, for each backend, each reason that excludes it, with the families."""
    families: dict[tuple[str, str], dict[str, None]] = {}
    for op, known in ops.items():
        for backend, verdict in known["backends"].items():
            for reason in verdict["reasons"]:
                text = reason.removeprefix(op).strip().removeprefix("has ")
                families.setdefault((backend, text), {})[known["family"]] = None
    count = len({known["family"] for known in ops.values()})
    for (backend, reason), names in families.items():
        yield backend, f"{reason}: {'all ops' if len(names) == count else ', '.join(names)}"


def _missing(packages: dict[str, dict[str, str | None]]) -> Iterator[str]:
    """Yield the command that completes all extras, and the packages that it installs."""
    names: dict[str, dict[str, None]] = {
        extra: {name: None for name, version in versions.items() if version is None}
        for extra, versions in packages.items()
        if extra
    }
    if incomplete := [extra for extra in names if names[extra]]:
        missing = dict.fromkeys(name for extra in incomplete for name in names[extra])
        yield f"{install_command(','.join(incomplete))} brings {', '.join(missing)}"


def _rows(rows: Iterable[tuple[str, str]], width: int) -> str:
    """Format titles, each once, and texts, wrapped next to them."""
    indent, lines, last = " " * (_TITLE_WIDTH + 1), [], None
    for title, text in rows:
        start = f"{'' if title == last else title:<{_TITLE_WIDTH}} "
        lines.append(fill(text, width, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False))
        last = title
    return "\n".join(lines)


def _native_state(native: Facts) -> str:
    if not native["loaded"]:
        return "not loaded: all ops run on the reference implementation"
    archs, why_none = ", ".join(native.get("cuda_archs", [])), native["cuda_reason"]
    gpus = f"for GPUs {archs}" if archs else "without kernels for GPUs" + (f" ({why_none})" if why_none else "")
    return f"loaded, built by {native.get('compiler', 'an unknown compiler')} {gpus}"


def _isa_state(native: Facts) -> str:
    if not native["loaded"]:
        return "chosen by torch"
    if native["isa"] is None:
        return "not known"
    return f"{native['isa']} in use (built: {', '.join(native['isas_built'])})"


def _thread_state(threads: Facts, cores: int) -> str:
    waiting = " ".join(f"{name}={threads[name]}" for name in _WAITING if threads[name]) or "spinning for long"
    many = f"; set OMP_NUM_THREADS={cores}: there are no more cores" if threads["count"] > cores else ""
    advice = f"in your own programs set GOMP_SPINCOUNT={SPIN_COUNT} before `import torch`"
    return f"{threads['count']}{many}; waiting: {waiting}; {advice}"


def _cuda_state(cuda: Facts) -> str:
    driver = f"driver {cuda['driver']}" if cuda["driver"] else ""
    if cuda["available"]:
        names = [f"{cuda['devices'].count(name)} x {name}" for name in dict.fromkeys(cuda["devices"])]
        return ", ".join([*names, *([driver] if driver else [])]) + f", CUDA {cuda['version']}"
    if cuda["version"] is None:
        return "none: this torch is built without CUDA" + (f", but there is a {driver}" if driver else "")
    return f"none: torch is built for CUDA {cuda['version']}, but there is no usable GPU or driver"
