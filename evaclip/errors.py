"""Exceptions that say what can be done about them: a mistake to correct, or a run that must not be repeated."""

from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what was asked for; its message says what was given and what is accepted."""


class Refused(UserError):
    """What was asked for can be done, but its result would mislead; the message says how to have it all the same."""


class RunFailed(RuntimeError):
    """A training that can't go on and would fail again if a launcher restarted it."""


def unknown_name(kind: str, given: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest ones that do, in any spelling."""
    # Imported here as it brings torch along.
    from evakernels.names import unknown

    return UserError(unknown(kind, given, sorted(known)))
