"""Exceptions, and phrases that messages share. Imports no torch: the command line uses it."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_IGNORED = str.maketrans("", "", "-_ ")


class UserError(Exception):
    """Wrong input; the message names the given and the accepted values."""


class Refused(UserError):
    """Possible, but the result would mislead; the message names the option that allows it."""


class RunFailed(RuntimeError):
    """A training run that would fail again after a restart."""


class RunInterrupted(RuntimeError):
    """A training run that another start may continue from its last checkpoint; exit status 75 (EX_TEMPFAIL)."""


class RanksLost(RunInterrupted):
    """Another rank of a run ended, or didn't answer in time."""


class ReplicasDiffer(RunInterrupted):
    """Ranks that must hold equal weights don't."""


def unknown_name(kind: str, given: object, known: Iterable[str]) -> UserError:
    """Return the error for an unknown name, with the nearest known names, or else all of them."""
    names = sorted(known)
    return UserError(f"unknown {kind} {given!r}{hint(given, names) or '; known: ' + ', '.join(names)}")


def hint(given: object, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` with the nearest known names, or an empty string."""
    near = nearest(given, known)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def nearest(given: object, known: Iterable[str]) -> list[str]:
    """Return up to three known names: another spelling of the given one, or names that hold it or are similar."""
    names = {_plain(name): name for name in known}
    plain = _plain(given)
    near = [plain] if plain in names else [name for name in names if plain and plain in name]
    return [names[name] for name in (near or get_close_matches(plain, names, cutoff=0.55))[:3]]


def counted(count: int, noun: str) -> str:
    """Return `1 row` or `1,200 rows`, for nouns with a regular plural."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def require_finite(values: "Tensor", names: Sequence[object], what: str) -> None:
    """Check a model's outputs `[n, width]` for images or texts, which `what` and `names` call in the error.

    Raises:
        UserError: NaN or infinity.
    """
    bad = (~values.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"the model gives NaN or infinity for {len(bad)} of {len(values)} {what}s, first for"
            f" {str(names[bad[0]])[:80]!r}: its weights are broken, or need precision fp32"
        )


def _plain(name: object) -> str:
    return str(name).lower().translate(_IGNORED)
