"""Names and signatures of apex, flash-attn and xformers on evakernels' ops."""

from collections.abc import Callable, Mapping
from typing import NoReturn


def missing(module: str, replacements: Mapping[str, str]) -> Callable[[str], NoReturn]:
    """Returns a module's `__getattr__`, which names the replacement of a missing name.

    Args:
        module: name of the module.
        replacements: advice by name, or by several names separated by blanks.
    """
    known = {name: replacement for names, replacement in replacements.items() for name in names.split()}

    def refuse(name: str) -> NoReturn:
        if name in known:
            # `from module import name` would drop the message of an AttributeError.
            raise ImportError(f"{module} has no {name}: {known[name]}", name=module)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return refuse
