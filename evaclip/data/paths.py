"""Path lists: brace patterns, globs and '::'."""

import glob
import re
from pathlib import Path

from evaclip.data.remote import is_remote, local_name
from evaclip.errors import UserError

_INNERMOST_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_paths(pattern: str) -> list[str]:
    """'a-{000..012}.tar::b/*.tar' -> the files, in the order given (globs sorted); URLs and commands as they are.

    Raises UserError for a glob without a match, or local files that do not exist.
    """
    paths: list[str] = []
    for part in filter(None, (part.strip() for part in pattern.split("::"))):
        for expanded in expand_braces(part):
            paths += [expanded] if is_remote(expanded) else _local(expanded)
    if not paths:
        raise UserError(f"the data path {pattern!r} names no file")
    missing = [path for path in paths if not is_remote(path) and not Path(path).exists()]
    if missing:
        subject = f"{missing[0]} does not exist"
        raise UserError(subject if len(paths) == 1 else f"{len(missing)} of {len(paths)} files are missing: {subject}")
    return paths


def _local(pattern: str) -> list[str]:
    pattern = str(Path(pattern).expanduser())
    if not glob.has_magic(pattern) or Path(pattern).exists():
        return [local_name(Path(pattern))]
    matches = sorted(glob.glob(pattern))  # noqa: PTH207 - Path.glob refuses absolute patterns
    if not matches:
        raise UserError(f"no file matches {pattern!r}")
    return [local_name(Path(match)) for match in matches]


def expand_braces(pattern: str) -> list[str]:
    """'x{a,b}{08..10}' -> ['xa08', 'xa09', 'xa10', 'xb08', ...]: lists and zero-padded ranges, nested too."""
    match = _INNERMOST_BRACES.search(pattern)
    if not match:
        return [pattern]
    choices = _choices(match[1])
    if choices is None:
        raise UserError(f"{match[0]!r} in {pattern!r} is neither a list {{a,b}} nor a range {{000..123}}")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    # The innermost pair goes first, so what stands beside it in a list comes once per choice.
    return list(dict.fromkeys(text for choice in choices for text in expand_braces(head + choice + tail)))


def _choices(inside: str) -> list[str] | None:
    if bounds := _RANGE.fullmatch(inside):
        first, last = int(bounds[1]), int(bounds[2])
        width = len(bounds[1]) if bounds[1].startswith("0") else 0
        step = 1 if last >= first else -1
        return [f"{number:0{width}d}" for number in range(first, last + step, step)]
    return inside.split(",") if "," in inside else None
