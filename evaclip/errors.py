"""Exceptions, and phrases that messages share. Imports no torch: the command line uses it."""

from collections.abc import Iterable


class UserError(Exception):
    """Wrong input; the message names the given and the accepted values."""


class Refused(UserError):
    """Possible, but the result would mislead; the message names the option that allows it."""


class RunFailed(RuntimeError):
    """A training run that would fail again after a restart."""


def unknown_name(kind: str, given: object, known: Iterable[str]) -> UserError:
    """Return the error for an unknown name, with the nearest known names, or else all of them."""
    from evakernels.names import unknown  # here, because evakernels imports torch

    return UserError(unknown(kind, given, sorted(known)))


def counted(count: int, noun: str) -> str:
    """Return `1 row` or `1,200 rows`, for nouns with a regular plural."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
