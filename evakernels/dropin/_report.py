"""The report of `accelerate`: replaced modules and the ops that then ran, as data and as tables."""

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from .. import backends
from ._swap import original_class, own_class


@dataclass(frozen=True)
class Replaced:
    """A module that can run on `op`, by `backend`; each call decides by its arguments."""

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
    """How often a module's forward ran on `op`, by `backend`.

    `name` and `module` are empty for calls outside of accelerated modules, such as those of gradients.
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

    `str` of it is the headline and a table of each, a line for each kind of module.

    Attributes:
        blocks: names of the model's transformer blocks.
        attentions: names of its attentions, and of blocks without an attention module.
    """

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    ran: list[Ran] = field(default_factory=list)
    idle: list[Idle] = field(default_factory=list)
    model: "weakref.ref[nn.Module] | None" = field(default=None, repr=False, compare=False)
    blocks: list[str] = field(default_factory=list)
    attentions: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module) -> "Report":
        """An empty report on a model."""
        blocks = _find_blocks(model)
        return cls(model=weakref.ref(model), blocks=blocks, attentions=_find_attentions(model, blocks))

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
        own_code = {idle.name: idle.reason for idle in self.idle if idle.calls}
        ops = [done for done in self.replaced if done.name not in own_code]
        line = f"{len(ops)} of {len(self.replaced) + len(self.left)} modules"
        if own_code:
            reasons = ", ".join(dict.fromkeys(filter(None, own_code.values())))
            line += f", {len(own_code)} ran their own code{reasons and f' ({reasons})'}"
        if self.blocks:
            attending = [done for done in ops if done.name in self.attentions or done.name in self.blocks]
            accelerated = _parents(self.blocks, attending) - _parents(self.blocks, self.changed)
            line = f"{len(accelerated)} of {len(self.blocks)} blocks, {line}"
        names = dict.fromkeys(f"{left.module} of {left.library}" for left in self.changed)
        return f"{line}; not supported: {', '.join(names)}" if names else line

    @contextmanager
    def watch(self) -> Iterator["Report"]:
        """Counts the ops of accelerated modules inside the `with` block, in eager mode, and fills `ran` and `idle`.

        A fused step of another module reads the parameters of a module without calling it. Ops in compiled code count,
        but without their modules. Raises `RuntimeError` if the model doesn't exist any more.
        """
        model = None if self.model is None else self.model()
        if model is None:
            raise RuntimeError("the model of this report doesn't exist any more; call evakernels.accelerate on another")
        names = {module: name for name, module in model.named_modules() if original_class(own_class(module))}
        calls = _Calls(names)
        with calls.count():
            yield self

        def label(module: nn.Module | None) -> tuple[str, str]:
            return ("", "") if module is None else (names[module], own_class(module).__name__)

        self.ran = [
            Ran(*label(module), op.removesuffix("_forward"), backend, count)
            for (module, op, backend), count in calls.ops.items()
        ]
        busy = {module for module, *_ in calls.ops}
        self.idle = [
            Idle(*label(module), calls.modules[module], ", ".join(calls.reasons.get(module, {})))
            for module in names
            if module not in busy
        ]

    def __str__(self) -> str:
        counts = Counter((done.module, done.op, done.backend, "") for done in self.replaced)
        counts += Counter((left.module, "", "", left.reason) for left in self.left)
        rows = [(key[0], str(count), *key[1:]) for key, count in counts.items()]
        tables: list[list[tuple[str, ...]]] = [[("module", "count", "can run", "backend", "left because"), *rows]]
        if self.ran or self.idle:
            tables.append(self._table_of_calls())
        return f"{self.headline}\n" + "\n\n".join(map(_format, tables))

    def _table_of_calls(self) -> list[tuple[str, ...]]:
        entries = [((ran.module or "(no module)", ran.op, ran.backend, ""), ran.calls) for ran in self.ran]
        for idle in self.idle:
            reason = "own code" + (f": {idle.reason}" if idle.reason else "") if idle.calls else "never called"
            entries.append(((idle.module, "", "", reason), idle.calls))
        modules = Counter(key for key, _ in entries)
        rows = [
            (key[0], str(count), *key[1:3], str(sum(calls for other, calls in entries if other == key)), key[3])
            for key, count in modules.items()
        ]
        return [("module", "count", "ran", "backend", "calls", "idle"), *rows]


def _parents(blocks: list[str], modules: Sequence[Replaced | Left]) -> set[str]:
    """The blocks that hold some of the modules, or are among them."""
    names = [f"{module.name}." for module in modules]
    return {block for block in blocks if any(name.startswith(f"{block}.") for name in names)}


def _format(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


class _Calls:
    """Counts of calls, by module and by (module, op, backend); the module is None for ops outside of all modules.

    Calls of modules inside of compiled code aren't counted.
    """

    def __init__(self, modules: dict[nn.Module, str]) -> None:
        self.modules: Counter[nn.Module] = Counter()
        self.ops: Counter[tuple[nn.Module | None, str, str]] = Counter()
        self.reasons: dict[nn.Module, dict[str, None]] = {}
        """Why modules ran their own code, in the order of the calls."""
        self._observed = modules
        self._running: list[nn.Module] = []

    @contextmanager
    def count(self) -> Iterator[None]:
        """Counts calls inside the `with` block, in the whole process."""
        # Global hooks, since a hook on a module would keep it out of fused steps.
        entering = register_module_forward_pre_hook(self._enter)
        leaving = register_module_forward_hook(self._leave, always_call=True)
        try:
            with backends.observed_by(self._count_op, self._note_reason):
                yield
        finally:
            entering.remove()
            leaving.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and module in self._observed:
            self.modules[module] += 1
            self._running.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and module in self._running:
            while self._running.pop() is not module:  # modules that an exception has ended
                pass

    def _count_op(self, op: str, backend: str) -> None:
        self.ops[self._running[-1] if self._running else None, op, backend] += 1

    def _note_reason(self, reason: str) -> None:
        if self._running:
            self.reasons.setdefault(self._running[-1], {})[reason] = None


# --- blocks and attentions --------------------------------------------------------------------------------------------


def _find_blocks(model: nn.Module) -> list[str]:
    """Names of the outermost members of lists and sequences that hold an attention, by its name or its class's."""
    attending: set[str] = set()
    for name, module in model.named_modules():
        last = name.rpartition(".")[2].lower()
        if "attn" in last or "attention" in last or "attention" in type(module).__name__.lower():
            attending.update(_prefixes(name))
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and not any(path in found for path in _prefixes(name)):
            members = [f"{name}.{key}" if name else key for key, _ in module.named_children()]
            found |= dict.fromkeys(member for member in members if member in attending)
    return list(found)


def _find_attentions(model: nn.Module, blocks: list[str]) -> frozenset[str]:
    """Names of the innermost modules with an attention's class name, and of blocks without one."""
    named = {name for name, module in model.named_modules() if "attention" in type(module).__name__.lower()} | {*blocks}
    return frozenset(named - {path for name in named for path in _prefixes(name) if path != name})


def _prefixes(name: str) -> list[str]:
    """The name of a module, and the names of the modules that hold it."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]
