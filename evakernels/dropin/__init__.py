"""Other people's models on these ops: `accelerate(model)` swaps modules in place, `restore(model)` swaps them back."""

from evakernels.dropin._report import Idle, Left, Ran, Replaced, Report
from evakernels.dropin._walk import UnknownFormWarning, accelerate, restore

__all__ = ["Idle", "Left", "Ran", "Replaced", "Report", "UnknownFormWarning", "accelerate", "restore"]
