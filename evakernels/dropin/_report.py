"""The report of `accelerate`: replaced modules and the ops that then ran, as data and as tables."""

import importlib
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from torch import nn

from ._swap import original_class, own_class
from ._watch import Calls, watch


@dataclass(frozen=True)
class Replaced:
    """A module that can run on `op`, served by `backend`; each call decides by its arguments."""

    name: str
    module: str
    op: str
    backend: str


@dataclass(frozen=True)
class Left:
    """A module that keeps its own code, and why.

    `library` is the name and version of the library of a supported class that behaves differently; otherwise empty.
    """

    name: str
    module: str
    reason: str
    library: str = ""


@dataclass(frozen=True)
class Ran:
    """How often a module's forward ran on `op`, served by `backend`.

    `name` and `module` are empty for calls that no accelerated module made: those of gradients.
    """

    name: str
    module: str
    op: str
    backend: str
    calls: int


@dataclass(frozen=True)
class Idle:
    """A replaced module that ran on no op.

    Attributes:
        calls: calls that ran its own code; 0 if it was never called, as part of the step of another module.
        reason: why its own code ran, such as `mask`, `dropout`, `too small` or `float64 on cpu`; empty if unknown.
    """

    name: str
    module: str
    calls: int
    reason: str = ""


@dataclass
class Report:
    """Replaced modules and modules that were left; after a `watch` also ops that `ran` and `idle` modules.

    `str` of it is the headline and a table of each, a line for each kind of module; rich prints it in colour.

    Attributes:
        blocks: names of the model's transformer blocks.
        attentions: names of its attentions, and of blocks whose attention isn't a module of its own.
    """

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    ran: list[Ran] = field(default_factory=list)
    idle: list[Idle] = field(default_factory=list)
    model: "weakref.ref[nn.Module] | None" = field(default=None, repr=False, compare=False)
    blocks: list[str] = field(default_factory=list)
    attentions: frozenset[str] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        """A copy and a pickle have no model: weak references can't be copied."""
        return {**self.__dict__, "model": None}

    @property
    def changed(self) -> list[Left]:
        """Modules of a supported class that behave differently from their replacement."""
        return [left for left in self.left if left.library]

    @property
    def headline(self) -> str:
        """Such as "12 of 12 blocks, 109 of 110 modules": of supported modules and attentions.

        A block counts if it or its attention was replaced, and it holds no module that behaves differently. After a
        `watch` modules that ran their own code don't count.
        """
        if not self.changed:
            return self._counted()
        names = dict.fromkeys(f"{left.module} of {left.library}" for left in self.changed)
        return f"{self._counted()}; not supported: {', '.join(names)}"

    def _counted(self) -> str:
        own_code = {idle.name: idle.reason for idle in self.idle if idle.calls}
        ops = [done for done in self.replaced if done.name not in own_code]
        modules = f"{len(ops)} of {len(self.replaced) + len(self.left)} modules"
        if own_code:
            reasons = ", ".join(dict.fromkeys(filter(None, own_code.values())))
            modules += f", {len(own_code)} ran their own code{reasons and f' ({reasons})'}"
        if not self.blocks:
            return modules
        main = [done for done in ops if done.name in self.attentions or done.name in self.blocks]
        served, strange = _holders(self.blocks, main), _holders(self.blocks, self.changed)
        return f"{len(served - strange)} of {len(self.blocks)} blocks, {modules}"

    @contextmanager
    def watch(self) -> Iterator["Report"]:
        """Counts, in eager mode, what the accelerated modules run inside the `with` block, and fills `ran` and `idle`.

        A module that was never called may be part of a fused step of another module, which reads its parameters. Code
        under `torch.compile` counts its ops, but not the modules that run them.

        Raises:
            RuntimeError: if the model doesn't exist any more.
        """
        model = None if self.model is None else self.model()
        if model is None:
            raise RuntimeError("the model of this report doesn't exist any more; call evakernels.accelerate on another")
        swapped = {module: name for name, module in model.named_modules() if original_class(own_class(module))}
        with watch(list(swapped)) as calls:
            yield self
        self._tell(calls, swapped)

    def _tell(self, calls: Calls, swapped: dict[nn.Module, str]) -> None:
        def names(module: nn.Module | None) -> tuple[str, str]:
            return ("", "") if module is None else (swapped[module], own_class(module).__name__)

        self.ran = [
            Ran(*names(module), op.removesuffix("_forward"), backend, count)
            for (module, op, backend), count in calls.ops.items()
        ]
        busy = {module for module, *_ in calls.ops}
        self.idle = [
            Idle(*names(module), calls.modules[module], ", ".join(calls.reasons.get(module, {})))
            for module in swapped
            if module not in busy
        ]

    def __str__(self) -> str:
        tables = self._tables()
        if find_spec("rich") is None:
            return f"{self.headline}\n" + "\n\n".join(map(_plain, tables))
        console = importlib.import_module("rich.console").Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self.__rich__())
        text: str = capture.get()
        return text.rstrip("\n")

    def __rich__(self) -> Any:
        return importlib.import_module("rich.console").Group(self.headline, *map(_rich, self._tables()))

    def _tables(self) -> list[list[tuple[str, ...]]]:
        return [self._found(), self._what_ran()] if self.ran or self.idle else [self._found()]

    def _found(self) -> list[tuple[str, ...]]:
        counts: dict[tuple[str, ...], int] = {}
        for done in self.replaced:
            key = done.module, done.op, done.backend, ""
            counts[key] = counts.get(key, 0) + 1
        for left in self.left:
            key = left.module, "", "", left.reason
            counts[key] = counts.get(key, 0) + 1
        rows = [(key[0], str(count), *key[1:]) for key, count in counts.items()]
        return [("module", "count", "can run", "backend", "left because"), *rows]

    def _what_ran(self) -> list[tuple[str, ...]]:
        counts: dict[tuple[str, ...], tuple[int, int]] = {}
        for ran in self.ran:
            key = ran.module or "(no module)", ran.op, ran.backend, ""
            modules, calls = counts.get(key, (0, 0))
            counts[key] = modules + 1, calls + ran.calls
        for idle in self.idle:
            own_code = f"own code: {idle.reason}" if idle.reason else "own code"
            key = idle.module, "", "", own_code if idle.calls else "never called"
            modules, calls = counts.get(key, (0, 0))
            counts[key] = modules + 1, calls + idle.calls
        rows = [(key[0], str(modules), *key[1:3], str(calls), key[3]) for key, (modules, calls) in counts.items()]
        return [("module", "count", "ran", "backend", "calls", "idle"), *rows]


def _holders(blocks: list[str], modules: Sequence[Replaced | Left]) -> set[str]:
    """The blocks that hold some of the modules, or are among them."""
    names = [f"{module.name}." for module in modules]
    return {block for block in blocks if any(name.startswith(f"{block}.") for name in names)}


def _plain(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _rich(rows: list[tuple[str, ...]]) -> Any:
    header, *rest = rows
    table = importlib.import_module("rich.table").Table(*header)
    for row in rest:
        table.add_row(*row, style=None if row[2] else "dim")
    return table
