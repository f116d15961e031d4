"""The one exception that means "the user can fix this"."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in what was asked for; its message says what was given and what is accepted."""


def unknown_name(kind: str, given: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest ones that do."""
    names = sorted(known)
    spelled = {name.lower(): name for name in names}
    near = [spelled[name] for name in get_close_matches(given.lower(), spelled, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(names)}"
    return UserError(f"unknown {kind} {given!r}; {hint}")
