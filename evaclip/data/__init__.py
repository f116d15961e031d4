"""Image-text data: sources, the order of samples, and loaders for training and evaluation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from evaclip.data.config import DataConfig as DataConfig
    from evaclip.data.loader import Batch as Batch
    from evaclip.data.loader import EvalBatch as EvalBatch
    from evaclip.data.loader import TrainLoader as TrainLoader
    from evaclip.data.loader import iterate as iterate
    from evaclip.data.loader import tokenized as tokenized
    from evaclip.data.opening import open_configured as open_configured
    from evaclip.data.opening import open_source as open_source
    from evaclip.data.order import SampleOrder as SampleOrder
    from evaclip.data.order import sample_order as sample_order
    from evaclip.data.samples import BadSample as BadSample
    from evaclip.data.samples import Decoding as Decoding
    from evaclip.data.samples import Fault as Fault
    from evaclip.data.samples import FaultKind as FaultKind
    from evaclip.data.samples import RawSample as RawSample
    from evaclip.data.source import Source as Source

Kind = Literal["auto", "webdataset", "csv", "jsonl", "parquet", "folder", "synthetic"]
KINDS: tuple[str, ...] = get_args(Kind)

_MODULES = {
    "config": ("DataConfig",),
    "loader": ("Batch", "EvalBatch", "TrainLoader", "iterate", "tokenized"),
    "opening": ("open_configured", "open_source"),
    "order": ("SampleOrder", "sample_order"),
    "samples": ("BadSample", "Decoding", "Fault", "FaultKind", "RawSample"),
    "source": ("Source",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Loaded on first use: the command line imports this package and shouldn't wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'evaclip.data' has no attribute {name!r}")
    return getattr(import_module(f"evaclip.data.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
