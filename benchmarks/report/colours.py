"""One colour for each candidate, the same on all pages; `style.css` holds the values for both themes."""

from collections.abc import Iterable, Mapping

from benchmarks.candidates import COMPILE, OURS
from benchmarks.results import Row
from evaclip.report.theme import COLOURS as THEME

# The peers' are Okabe and Ito's colour-blind-safe set ("Color Universal Design", 2008), darkened where it is too pale
# for lines on white, without its blues, which belong to this library.
_OWN = {
    "ours-reference": "#8fa9e6",
    "eager": "#8b939d",
    "compile": "#b0609a",
    "peer-1": "#dd8f00",
    "peer-2": "#0b9a74",
    "peer-3": "#cf5400",
    "peer-4": "#3fa7dd",
    "peer-5": "#a3941a",
    "peer-6": "#7a3b2e",
}
COLOURS: Mapping[str, str] = {**THEME, **_OWN}
"""Hexadecimal values by the name of the CSS variable."""
_PEERS = [name for name in _OWN if name.startswith("peer-")]


def colour_names(rows: Iterable[Row]) -> dict[str, str]:
    """The name of a colour in `COLOURS` for every candidate: first this library's, then PyTorch's, then the peers'.

    Peers get theirs in the order of their names; with more than six peers the colours start again.
    """
    kinds = {row.candidate: row.kind for row in rows}
    peers = sorted(name for name, kind in kinds.items() if kind == "peer" and name != COMPILE)
    names = {name: "accent" for name in sorted(kinds) if kinds[name] == "ours"}
    names |= {name: "ours-reference" for name in names if name == f"{OURS} reference"}
    names |= {name: "eager" for name, kind in kinds.items() if kind == "baseline"}
    names |= {name: "compile" for name in kinds if name == COMPILE}
    return names | {name: _PEERS[index % len(_PEERS)] for index, name in enumerate(peers)}
