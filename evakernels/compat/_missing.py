"""What a face lacks of its library: known names raise a sentence in the place of a bare ImportError."""

from collections.abc import Callable, Mapping
from typing import NoReturn


def missing(module: str, sentences: Mapping[str, str]) -> Callable[[str], NoReturn]:
    """The `__getattr__` of a module that raises `ImportError` for the names of the library that it doesn't serve.

    Args:
        module: its name.
        sentences: what to do without them; a key is one name or several, with blanks between.
    """
    known = {name: sentence for names, sentence in sentences.items() for name in names.split()}

    def refuse(name: str) -> NoReturn:
        if name in known:
            # `from module import name` makes a bare ImportError of any AttributeError.
            raise ImportError(f"{module} has no {name}: {known[name]}", name=module)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return refuse
