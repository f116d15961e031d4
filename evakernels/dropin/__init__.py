"""Other people's models on these ops: `accelerate(model)` swaps modules in place, `restore(model)` swaps them back."""

from evakernels.dropin._report import Left, Replaced, Report
from evakernels.dropin._walk import accelerate, restore

__all__ = ["Left", "Replaced", "Report", "accelerate", "restore"]
