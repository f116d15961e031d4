"""Messages for misspelt names of ops, models, options and files, with the nearest known names."""

from collections.abc import Iterable
from difflib import get_close_matches

_IGNORED = str.maketrans("", "", "-_ ")


def unknown(argument: str, value: object, choices: Iterable[str]) -> str:
    """The message for an argument that isn't one of the known names, with the nearest ones."""
    names = list(choices)
    return f"{argument} must be one of {', '.join(names)}, got {value!r}{hint(value, names)}"


def hint(value: object, choices: Iterable[str]) -> str:
    """The question whether one of the known names is meant; nothing if none is near."""
    near = nearest(value, choices)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def nearest(value: object, choices: Iterable[str]) -> list[str]:
    """Up to three known names: another spelling of the given one, or names that contain it or are similar."""
    names = {_plain(name): name for name in choices}
    plain = _plain(value)
    near = [plain] if plain in names else [name for name in names if plain and plain in name]
    return [names[name] for name in (near or get_close_matches(plain, names, cutoff=0.55))[:3]]


def _plain(name: object) -> str:
    return str(name).lower().translate(_IGNORED)
