"""The modules of a model that `accelerate` may replace: patterns of names and classes."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from ..names import nearest

Patterns = str | Iterable[str]

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


class Choice:
    """A selection of modules by patterns of `fnmatch`.

    A pattern that matches a name selects all modules below it, too.

    Args:
        modules: all modules, as pairs of dotted name and class name.
        known: the supported ones of `modules`.

    Raises:
        TypeError: a pattern isn't a str.
        ValueError: a pattern matches none of `modules` or, in `include`, none of `known`.
    """

    def __init__(
        self,
        modules: list[tuple[str, str]],
        known: list[tuple[str, str]],
        include: Patterns | None,
        exclude: Patterns | None,
    ) -> None:
        self.include = None if include is None else _checked("include", include, known)
        self.exclude = [] if exclude is None else _checked("exclude", exclude, modules)

    def includes(self, name: str, cls: str) -> bool:
        return self.include is None or _matches(self.include, name, cls)

    def excludes(self, name: str, cls: str) -> bool:
        return _matches(self.exclude, name, cls)


def _matches(patterns: list[str], name: str, cls: str) -> bool:
    paths = [name, *(name[: dot.start()] for dot in re.finditer(r"\.", name)), cls]
    return any(fnmatchcase(path, pattern) for path in paths for pattern in patterns)


def _checked(argument: str, patterns: Patterns, modules: list[tuple[str, str]]) -> list[str]:
    found = list(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str) else [patterns]
    for pattern in found:
        if not isinstance(pattern, str):
            raise TypeError(f"accelerate: {argument}={pattern!r}; accepted: patterns of names and classes, each a str")
        if not any(_matches([pattern], *module) for module in modules):
            known = {form for name, cls in modules for form in (_NUMBER.sub("*", name), cls) if form}
            near = nearest(pattern, sorted(known)) or sorted({cls for _, cls in modules})
            raise ValueError(
                f"accelerate: {argument}={pattern!r} matches the name or class of no module"
                f"{' that is supported' if argument == 'include' else ''}; "
                f"near are {', '.join(near)}; `*` stands for any characters"
            )
    return found
