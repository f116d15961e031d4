"""Rows side by side: who is the fastest of each kind in a case, and how this library compares with the others."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from benchmarks.results import Row

T = TypeVar("T")
K = TypeVar("K")


class Contest:
    """The rows of one case, `op`, `mode`, `shape` and `dtype`: candidates that were measured side by side."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)
        self.op, self.mode, self.shape, self.dtype, _ = rows[0].case

    @property
    def title(self) -> str:
        """One line that names it."""
        return f"{self.op}, {self.mode}, {self.shape}, {self.dtype}"

    @property
    def measured(self) -> list[Row]:
        """The rows that have a time, in the order of measurement: no failures and no wrong results."""
        return [row for row in self.rows if row.failure is None and row.median_ms is not None]

    @property
    def fastest_ms(self) -> float | None:
        """The lowest median of all."""
        return min((row.median_ms for row in self.measured if row.median_ms is not None), default=None)

    @property
    def ours(self) -> Row | None:
        """The fastest of this library."""
        return self.fastest("ours")

    @property
    def eager(self) -> Row | None:
        """Plain PyTorch."""
        return self.fastest("baseline")

    @property
    def peer(self) -> Row | None:
        """The fastest of the peers, `torch.compile` among them."""
        return self.fastest("peer")

    @property
    def rival(self) -> Row | None:
        """The fastest of all that isn't this library's."""
        return self.fastest("baseline", "peer")

    @property
    def intensity(self) -> float | None:
        """FLOPs a byte; None for an operation without matrix products."""
        row = self.rows[0]
        return row.flops / row.bytes if row.flops and row.bytes else None

    def speedup(self, row: Row) -> float | None:
        """The median time of plain PyTorch over that of `row`: 2 is twice as fast."""
        ours, eager = row.median_ms, self.eager and self.eager.median_ms
        return eager / ours if ours and eager and row.failure is None else None

    def fastest(self, *kinds: str) -> Row | None:
        """The fastest candidate of these kinds; None if none has a time."""
        rows = [row for row in self.measured if row.kind in kinds]
        return min(rows, key=lambda row: row.median_ms or 0.0, default=None)


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The items by their keys, in the order of the first ones."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def contests(rows: Iterable[Row]) -> list[Contest]:
    """The rows by case, in the order of their first rows."""
    return list(map(Contest, grouped(rows, lambda row: row.case).values()))


def panels(found: Iterable[Contest]) -> dict[tuple[str, str, str], list[Contest]]:
    """The contests that are shown together: of the same operation, mode and dtype; they differ in their shapes."""
    return grouped(found, lambda contest: (contest.op, contest.mode, contest.dtype))


@dataclass(frozen=True)
class Verdict:
    """This library's fastest against the fastest of all others, plain PyTorch among them.

    Attributes:
        rival: that other.
        ratio: its median time over ours: 2 is twice as fast.
        level: whether the difference is within the noise.
    """

    ours: Row
    rival: Row
    ratio: float
    level: bool

    @property
    def word(self) -> str:
        """`faster`, `slower` or `level`."""
        return "level" if self.level else "faster" if self.ratio > 1 else "slower"


def verdict(contest: Contest) -> Verdict | None:
    """How this library does in a case; None if it or all others have no time.

    Both were measured in the same rounds. The difference is noise if the ratios of these rounds lie on both sides of 1,
    the outer fifths left out, or if the medians of the passes over the suite do, or the ratio of all times and that of
    the rounds: a machine whose speed changes between passes can turn the former round.
    """
    ours, rival = contest.ours, contest.rival
    if ours is None or rival is None or not ours.median_ms or not rival.median_ms:
        return None
    passes = [
        sorted(other / own for own, other in zip(mine, theirs, strict=False))
        for mine, theirs in zip(ours.samples_ms, rival.samples_ms, strict=False)
    ]
    ratios = sorted(ratio for one_pass in passes for ratio in one_pass)
    if not ratios:
        return None
    low, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.2, 0.8))
    medians = [median(one_pass) for one_pass in passes if one_pass]
    ratio = rival.median_ms / ours.median_ms
    level = any(min(several) <= 1 <= max(several) for several in ((low, high), medians, (ratio, median(ratios))))
    return Verdict(ours, rival, ratio, level)


def tally(found: Iterable[Contest]) -> Counter[str]:
    """In how many cases this library is `faster`, `slower` or `level`; the sum is of those that have a verdict."""
    return Counter(one.word for one in map(verdict, found) if one is not None)
