"""The transformer blocks and attentions of a model."""

from torch import nn


def blocks(model: nn.Module) -> list[str]:
    """Names of the outermost members of lists and sequences that hold an attention, by its name or its class's."""
    attending: set[str] = set()
    for name, module in model.named_modules():
        last = name.rpartition(".")[2].lower()
        if "attn" in last or "attention" in last or "attention" in type(module).__name__.lower():
            attending.update(_paths(name))
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and not any(path in found for path in _paths(name)):
            members = [f"{name}.{key}" if name else key for key, _ in module.named_children()]
            found |= dict.fromkeys(member for member in members if member in attending)
    return list(found)


def attentions(model: nn.Module, found: list[str]) -> frozenset[str]:
    """Names of the innermost modules whose class is an attention by its name, and of the `found` blocks without one."""
    named = {name for name, module in model.named_modules() if "attention" in type(module).__name__.lower()} | {*found}
    return frozenset(named - {path for name in named for path in _paths(name) if path != name})


def _paths(name: str) -> list[str]:
    """The name of a module, and those of the modules that hold it."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]
