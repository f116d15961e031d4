"""Image-text data: sources, the order of samples, and loaders for training and evaluation."""

from evaclip.data.config import DataConfig
from evaclip.data.evaluation import EvalBatch, iterate
from evaclip.data.loader import Batch, TrainLoader
from evaclip.data.opening import open_configured, open_source
from evaclip.data.order import SampleOrder, sample_order
from evaclip.data.samples import BadSample, Fault, FaultKind, RawSample
from evaclip.data.source import Source

__all__ = [
    "BadSample",
    "Batch",
    "DataConfig",
    "EvalBatch",
    "Fault",
    "FaultKind",
    "RawSample",
    "SampleOrder",
    "Source",
    "TrainLoader",
    "iterate",
    "open_configured",
    "open_source",
    "sample_order",
]
