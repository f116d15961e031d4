"""The report of `accelerate`: replaced modules and modules that keep their own code, as data and as a table."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn


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


@dataclass
class Report:
    """Replaced modules and modules that were left; `str` of it is the headline and a table by kind of module.

    Attributes:
        blocks: names of the model's transformer blocks.
        attentions: names of its attentions, and of blocks without an attention module.
    """

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    attentions: frozenset[str] = frozenset()

    @classmethod
    def from_model(cls, model: nn.Module) -> "Report":
        """An empty report on a model."""
        blocks = _find_blocks(model)
        return cls(blocks=blocks, attentions=_find_attentions(model, blocks))

    @property
    def changed(self) -> list[Left]:
        """Modules of a supported class that behave differently from their replacement."""
        return [left for left in self.left if left.library]

    @property
    def headline(self) -> str:
        """Such as "12 of 12 blocks, 109 of 110 modules": of supported modules and attentions.

        A block counts if it or its attention was replaced, and it holds no module that behaves differently.
        """
        line = f"{len(self.replaced)} of {len(self.replaced) + len(self.left)} modules"
        if self.blocks:
            attending = [done for done in self.replaced if done.name in self.attentions or done.name in self.blocks]
            accelerated = _parents(self.blocks, attending) - _parents(self.blocks, self.changed)
            line = f"{len(accelerated)} of {len(self.blocks)} blocks, {line}"
        names = dict.fromkeys(f"{left.module} of {left.library}" for left in self.changed)
        return f"{line}; not supported: {', '.join(names)}" if names else line

    def __str__(self) -> str:
        counts = Counter((done.module, done.op, done.backend, "") for done in self.replaced)
        counts += Counter((left.module, "", "", left.reason) for left in self.left)
        rows = [("module", "count", "can run", "backend", "left because")]
        rows += [(key[0], str(count), *key[1:]) for key, count in counts.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join([self.headline, *lines])


def _parents(blocks: list[str], modules: Sequence[Replaced | Left]) -> set[str]:
    """The blocks that hold some of the modules, or are among them."""
    names = [f"{module.name}." for module in modules]
    return {block for block in blocks if any(name.startswith(f"{block}.") for name in names)}


# --- blocks and attentions --------------------------------------------------------------------------------------------


def _find_blocks(model: nn.Module) -> list[str]:
    """Names of the outermost members of lists and sequences that hold an attention, by its name or its class's."""
    attending: set[str] = set()
    for name, module in model.named_modules():
        last = name.rpartition(".")[2].lower()
        if "attn" in last or "attention" in last or "attention" in type(module).__name__.lower():
            attending.update(_prefixes(name))
    blocks: dict[str, None] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and not any(path in blocks for path in _prefixes(name)):
            members = [f"{name}.{key}" if name else key for key, _ in module.named_children()]
            blocks |= dict.fromkeys(member for member in members if member in attending)
    return list(blocks)


def _find_attentions(model: nn.Module, blocks: list[str]) -> frozenset[str]:
    """Names of the innermost modules with an attention's class name, and of blocks without one."""
    named = {name for name, module in model.named_modules() if "attention" in type(module).__name__.lower()} | {*blocks}
    return frozenset(named - {path for name in named for path in _prefixes(name) if path != name})


def _prefixes(name: str) -> list[str]:
    """The name of a module, and the names of the modules that hold it."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]
