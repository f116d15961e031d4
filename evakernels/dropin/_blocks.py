"""The blocks of a model, as people count them."""

from torch import nn


def blocks(model: nn.Module) -> list[str]:
    """Names of the outermost members of lists and sequences that hold an attention, by the name of it or its class."""
    attending: set[str] = set()
    for name, module in model.named_modules():
        if (
            "attn" in name.rpartition(".")[2].lower()
            or "attention" in f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
        ):
            parts = name.split(".")
            attending.update(".".join(parts[:count]) for count in range(1, len(parts) + 1))
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in found[-1:])
        if not inside and isinstance(module, nn.ModuleList | nn.Sequential):
            members = [f"{name}.{key}" if name else key for key, _ in module.named_children()]
            found += [member for member in members if member in attending]
    return found
