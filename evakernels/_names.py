"""Names that users give, of ops, backends and options."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(kind: str, given: object, known: Iterable[str]) -> str:
    """The message for a name that doesn't exist, with the nearest ones that do, or else with all."""
    names = list(known)
    return f"unknown {kind} {given!r}{hint(given, names) or '; known: ' + ', '.join(names)}"


def hint(given: object, known: Iterable[str]) -> str:
    """The question whether one of the known names is meant, in another spelling or in part; nothing if none is near."""
    names = {_plain(name): name for name in known}
    plain = _plain(given)
    near = [plain] if plain in names else [name for name in names if plain in name]
    near = near or get_close_matches(plain, names, cutoff=0.7)
    return f"; did you mean {' or '.join(repr(names[name]) for name in near[:3])}?" if plain and near else ""


def _plain(name: object) -> str:
    return str(name).lower().replace("-", "").replace("_", "")
