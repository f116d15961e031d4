"""Other people's models on these ops: `accelerate(model)` swaps modules in place, `restore(model)` swaps them back."""

from ._accelerate import ChangedModuleWarning, accelerate, restore
from ._report import Left, Replaced, Report

__all__ = ["ChangedModuleWarning", "Left", "Replaced", "Report", "accelerate", "restore"]
