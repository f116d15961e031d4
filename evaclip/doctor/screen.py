"""A diagnosis on one screen, in plain text, as nothing but the core may be installed."""

import re
from collections.abc import Iterable, Iterator
from textwrap import fill

from evaclip.doctor.diagnosis import Facts
from evaclip.extras import install_command

MARKS = {"live": "●", "usable": "○", "unable": "–", "fails": "✗"}  # noqa: RUF001
ASCII_MARKS = {"live": "*", "usable": "o", "unable": "-", "fails": "x"}
MIN_WIDTH, MAX_WIDTH = 60, 100

_MEANINGS = {"live": "live", "usable": "can, but isn't first", "unable": "can't", "fails": "calls fail"}
_TITLE_WIDTH = 12
_LABEL_WIDTH = 40


def render(facts: Facts, verbose: bool, width: int, marks: dict[str, str]) -> str:
    """What `diagnose` returns as text; `marks` stand for the states of a backend."""
    parts = [
        _rows((("broken", f"{p['what']}; fix: {p['fix']}") for p in facts["problems"]), width),
        _rows(system_rows(facts), width),
        _matrix(facts["ops"], marks, width),
        _rows(reason_rows(facts["ops"]), width),
        _rows((("missing", text) for text in _missing(facts["packages"])), width),
    ]
    if verbose:
        parts += ["\n".join(_op_lines(facts["ops"], width)), "\n".join(_package_lines(facts["packages"]))]
    return "\n\n".join(part for part in parts if part)


def marks_for(encoding: str) -> dict[str, str]:
    """The marks that a terminal of this encoding can show."""
    try:
        "".join(MARKS.values()).encode(encoding)
    except (LookupError, UnicodeEncodeError):
        return ASCII_MARKS
    return MARKS


def system_rows(facts: Facts) -> list[tuple[str, str]]:
    """Machine, GPUs, versions and the native library: a title and what there is."""
    machine, triton = facts["machine"], facts["triton"] or "not installed (needed for kernels on GPUs only)"
    return [
        ("machine", f"{machine['processor']}, {machine['cores']} cores; instruction set {_isa_state(facts['native'])}"),
        ("GPU", _cuda_state(facts["cuda"])),
        ("evakernels", f"{facts['evakernels'] or 'not installed'}; native library {_native_state(facts['native'])}"),
        ("Python", f"{facts['python']}, torch {facts['torch']}, triton {triton}"),
    ]


def reason_rows(ops: dict[str, Facts]) -> Iterator[tuple[str, str]]:
    """Each reason why a backend doesn't serve, once: the backends, then the reason with the ops that it concerns."""
    concerned: dict[str, dict[str, list[str]]] = {}
    for op, known in ops.items():
        for backend, verdict in known["backends"].items():
            for reason in verdict["reasons"]:
                concerned.setdefault(_without_name(reason, op), {}).setdefault(backend, []).append(op)
    for reason, by_backend in concerned.items():
        names = {backend: _names(found, ops) for backend, found in by_backend.items()}
        alike = len(set(names.values())) == 1
        which = next(iter(names.values())) if alike else "; ".join(f"{b} for {found}" for b, found in names.items())
        yield ", ".join(names), f"{reason}: {which}"


def _names(found: list[str], ops: dict[str, Facts]) -> str:
    """Names of ops, in short: "all ops", or the families that are there as a whole and the other ops."""
    if len(found) == len(ops):
        return "all ops"
    members: dict[str, list[str]] = {}
    for op, known in ops.items():
        members.setdefault(known["family"], []).append(op)
    whole = [family for family, of_it in members.items() if set(of_it) <= set(found)]
    names = [*whole, *(op for op in found if ops[op]["family"] not in whole)]
    return ", ".join(sorted(names))


def _matrix(ops: dict[str, Facts], marks: dict[str, str], width: int) -> str:
    """One row for each family, or several where its ops differ."""
    rows: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for op, known in ops.items():
        states = tuple(verdict["state"] for verdict in known["backends"].values())
        rows.setdefault((known["family"], states), []).append(op)
    families = [family for family, _ in rows]
    labels = [
        family if families.count(family) == 1 else f"{family}: {', '.join(_stems(of_row, family))}"
        for (family, _), of_row in rows.items()
    ]
    size = min(max(map(len, labels)), _LABEL_WIDTH)
    columns = list(next(iter(ops.values()))["backends"])
    lines = [" ".join(["".ljust(size), *(f"{column:^9}" for column in columns)])]
    for label, (_, states) in sorted(zip(labels, rows, strict=True)):
        lines.append(" ".join([f"{label[:size]:<{size}}", *(f"{marks[state]:^9}" for state in states)]))
    used = {state for _, states in rows for state in states}
    lines.append(fill("   ".join(f"{marks[state]} {_MEANINGS[state]}" for state in marks if state in used), width))
    return "\n".join(line.rstrip() for line in lines)


def _stems(ops: Iterable[str], family: str) -> list[str]:
    names = (re.sub("_(forward|backward)$", "", op).removeprefix(f"{family}_") for op in ops)
    return list(dict.fromkeys(names))


def _op_lines(ops: dict[str, Facts], width: int) -> Iterator[str]:
    for op, known in ops.items():
        verdicts = []
        for backend, verdict in known["backends"].items():
            text = "; ".join(_without_name(reason, op) for reason in verdict["reasons"]) or _MEANINGS[verdict["state"]]
            verdicts.append(f"{backend}: {text}")
        yield fill(f"{op}  {'; '.join(verdicts)}", width, subsequent_indent="  ", break_on_hyphens=False)


def _package_lines(packages: dict[str, dict[str, str | None]]) -> list[str]:
    rows = [(name, version, extra) for extra, found in packages.items() for name, version in found.items()]
    return [f"{name:<20} {version or 'not installed':<20} {extra or 'core'}" for name, version, extra in rows]


def _missing(packages: dict[str, dict[str, str | None]]) -> Iterator[str]:
    """The command that installs the extras that aren't there as a whole, and what each alone brings."""
    told, lacking = set[str](), dict[str, str]()
    for extra, found in packages.items():
        names = [name for name, version in found.items() if version is None and name not in told]
        told.update(names)
        if extra and names:
            lacking[extra] = ", ".join(names)
    if len(lacking) == 1:
        yield from (f"{install_command(extra)} brings {names}" for extra, names in lacking.items())
    elif lacking:
        yield f"{install_command('NAME,...')} brings what is wanted of"
        yield "; ".join(extra if names == extra else f"{extra}: {names}" for extra, names in lacking.items())


def _without_name(reason: str, op: str) -> str:
    return reason.removeprefix(op).strip().removeprefix("has ")


def _rows(rows: Iterable[tuple[str, str]], width: int) -> str:
    """Titles, each told once, and what they head, wrapped beside them."""
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


def _cuda_state(cuda: Facts) -> str:
    driver = f"driver {cuda['driver']}" if cuda["driver"] else ""
    if cuda["available"]:
        names = [f"{cuda['devices'].count(name)} x {name}" for name in dict.fromkeys(cuda["devices"])]
        return ", ".join([*names, *([driver] if driver else [])]) + f", CUDA {cuda['version']}"
    if cuda["version"] is None:
        return "none: this torch is built without CUDA" + (f", but there is a {driver}" if driver else "")
    return f"none: torch is built for CUDA {cuda['version']}, but there is no usable GPU or driver"
