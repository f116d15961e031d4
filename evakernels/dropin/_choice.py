"""Which modules of a model `accelerate` is asked to serve: patterns of names and classes."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from evakernels.names import nearest

Patterns = str | Iterable[str]

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


class Choice:
    """Of modules, given as pairs of dotted name and class name, those that patterns of `fnmatch` match.

    A pattern that matches a name stands for all that is below it, too.

    Args:
        known: those of `modules` that a rule knows.

    Raises:
        TypeError: for what isn't a pattern.
        ValueError: for a pattern that matches none of `modules` or, to include, none of `known`.
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
                f"{' that there is a rule for' if argument == 'include' else ''}; "
                f"near are {', '.join(near)}; `*` stands for any characters"
            )
    return found
