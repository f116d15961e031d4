"""Counts of calls of accelerated modules and of the ops that they run."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from .. import backends


class Calls:
    """Counts of calls, by module and by (module, op, backend); the module is None for ops outside of all modules.

    Calls of modules inside of compiled code aren't counted.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules: Counter[nn.Module] = Counter()
        self.ops: Counter[tuple[nn.Module | None, str, str]] = Counter()
        self.reasons: dict[nn.Module, dict[str, None]] = {}
        """Why modules ran their own code, in the order of the calls."""
        self._watched = set(modules)
        self._running: list[nn.Module] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and module in self._watched:
            self.modules[module] += 1
            self._running.append(module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and module in self._running:
            while self._running.pop() is not module:  # those that an exception has ended
                pass

    def serve(self, op: str, backend: str) -> None:
        self.ops[self._running[-1] if self._running else None, op, backend] += 1

    def refuse(self, reason: str) -> None:
        if self._running:
            self.reasons.setdefault(self._running[-1], {})[reason] = None


@contextmanager
def watch(modules: list[nn.Module]) -> Iterator[Calls]:
    """Counts what runs inside the `with` block, in the whole process.

    By hooks of all modules: one of its own would keep a module from being part of a fused step.
    """
    calls = Calls(modules)
    entering = register_module_forward_pre_hook(calls.enter)
    leaving = register_module_forward_hook(calls.leave, always_call=True)
    try:
        with backends.observed_by(calls.serve, calls.refuse):
            yield calls
    finally:
        entering.remove()
        leaving.remove()
