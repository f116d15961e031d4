"""Rows side by side: who is the fastest of each kind in a case, and how each compares with plain PyTorch."""

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.results import Row


@dataclass(frozen=True)
class Contest:
    """The rows of one case: candidates that were measured side by side."""

    rows: tuple[Row, ...]

    @property
    def op(self) -> str:
        """The operation."""
        return self.rows[0].op

    @property
    def mode(self) -> str:
        """`forward` or `training`."""
        return self.rows[0].mode

    @property
    def shape(self) -> str:
        """Name of the shape."""
        return self.rows[0].shape

    @property
    def dtype(self) -> str:
        """Name of the dtype."""
        return self.rows[0].dtype

    @property
    def title(self) -> str:
        """One line that names it."""
        return f"{self.op}, {self.mode}, {self.shape}, {self.dtype}"

    @property
    def measured(self) -> list[Row]:
        """The rows that have a time, in the order of measurement."""
        return [row for row in self.rows if row.failure is None and row.median_ms is not None]

    @property
    def fastest_ms(self) -> float | None:
        """The lowest median of all."""
        return min((row.median_ms for row in self.measured if row.median_ms is not None), default=None)

    @property
    def ours(self) -> Row | None:
        """The fastest of this library."""
        return self._fastest("ours")

    @property
    def eager(self) -> Row | None:
        """Plain PyTorch."""
        return self._fastest("baseline")

    @property
    def peer(self) -> Row | None:
        """The fastest of the peers, `torch.compile` among them."""
        return self._fastest("peer")

    @property
    def intensity(self) -> float | None:
        """FLOPs a byte; None for an operation without matrix products."""
        row = self.rows[0]
        return row.flops / row.bytes if row.flops and row.bytes else None

    def speedup(self, row: Row) -> float | None:
        """The median time of plain PyTorch over that of `row`: 2 is twice as fast."""
        ours, eager = row.median_ms, self.eager and self.eager.median_ms
        return eager / ours if ours and eager and row.failure is None else None

    def _fastest(self, kind: str) -> Row | None:
        rows = [row for row in self.measured if row.kind == kind]
        return min(rows, key=lambda row: row.median_ms or 0.0, default=None)


def contests(rows: Iterable[Row]) -> list[Contest]:
    """The rows by case, in the order of their first rows."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case, []).append(row)
    return [Contest(tuple(group)) for group in groups.values()]


def panels(found: Iterable[Contest]) -> dict[tuple[str, str, str], list[Contest]]:
    """The contests that are shown together: of the same operation, mode and dtype; they differ in their shapes."""
    groups: dict[tuple[str, str, str], list[Contest]] = {}
    for contest in found:
        groups.setdefault((contest.op, contest.mode, contest.dtype), []).append(contest)
    return groups


def verdict(contest: Contest) -> str | None:
    """How this library's fastest compares with plain PyTorch.

    `faster` or `slower` if the ranges from p20 to p80 don't touch, else `level`; None if either has no time.
    """
    ours, eager = contest.ours, contest.eager
    if ours is None or eager is None:
        return None
    if _range(ours)[1] < _range(eager)[0]:
        return "faster"
    return "slower" if _range(ours)[0] > _range(eager)[1] else "level"


def _range(row: Row) -> tuple[float, float]:
    return row.quantile_ms(0.2) or 0.0, row.quantile_ms(0.8) or 0.0
