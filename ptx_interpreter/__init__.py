"""Runs PTX, as nvcc and Triton write it, on a machine without a GPU: README.md."""

from .machine import launch
from .memory import GlobalMemory
from .parse import Kernel, Module
from .report import Fault, Faults, Report
from .traffic import Traffic
from .types import Unsupported

__all__ = ["Fault", "Faults", "GlobalMemory", "Kernel", "Module", "Report", "Traffic", "Unsupported", "launch"]
