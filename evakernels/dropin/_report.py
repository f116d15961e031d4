"""What `accelerate` did, as data and as a table."""

import importlib
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True)
class Replaced:
    """A module that runs on `op`, served by `backend`."""

    name: str
    module: str
    op: str
    backend: str


@dataclass(frozen=True)
class Left:
    """A module that runs as before, and why."""

    name: str
    module: str
    reason: str


@dataclass
class Report:
    """What `accelerate` found. `str` of it is a table, a line for each kind of module; rich prints it in colour."""

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __str__(self) -> str:
        rows = self._rows()
        if find_spec("rich") is None:
            widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
            return "\n".join(
                "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
            )
        console = importlib.import_module("rich.console").Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self.__rich__())
        text: str = capture.get()
        return text.rstrip("\n")

    def __rich__(self) -> Any:
        header, *rows = self._rows()
        table = importlib.import_module("rich.table").Table(*header)
        for row in rows:
            table.add_row(*row, style=None if row[2] else "dim")
        return table

    def _rows(self) -> list[tuple[str, ...]]:
        counts: dict[tuple[str, ...], int] = {}
        for done in self.replaced:
            key = done.module, done.op, done.backend, ""
            counts[key] = counts.get(key, 0) + 1
        for left in self.left:
            key = left.module, "", "", left.reason
            counts[key] = counts.get(key, 0) + 1
        rows = [(key[0], str(count), *key[1:]) for key, count in counts.items()]
        return [("module", "count", "now runs", "backend", "left because"), *rows]
