"""Other people's models on these ops: `accelerate(model)` swaps modules in place, `restore(model)` swaps them back."""

from ._accelerate import ChangedModuleWarning, accelerate, restore
from ._report import Idle, Left, Ran, Replaced, Report

__all__ = ["ChangedModuleWarning", "Idle", "Left", "Ran", "Replaced", "Report", "accelerate", "restore"]
