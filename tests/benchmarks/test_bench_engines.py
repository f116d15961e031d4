"""Engines of whole towers, and a loader: the same results as their baselines."""

from importlib.util import find_spec

import pytest
import torch
from bench_case_checks import build, draw, outputs

from benchmarks.accuracy import QUANTIZED, relative_error
from benchmarks.cases.models import parameters_of
from benchmarks.operation import get_operation, peers_of
from evaclip.errors import UserError

ENGINES = [peer.name for peer in peers_of("encode_image") if peer.package not in ("openvino", "zentorch")]
SLOW = ("compiled", "freezing", "of open_clip")


def error_of(op: str, engine: str, dtype: torch.dtype = torch.float32) -> float:
    """The error of an engine on the tiny model, against the baseline."""
    operation = get_operation(op)
    shape = operation.shape("small")
    inputs = draw(operation, shape, dtype)
    return relative_error(outputs(build(op, engine, shape), inputs), outputs(operation.eager, inputs))


@pytest.mark.parametrize(
    "engine",
    [pytest.param(n, marks=[pytest.mark.exhaustive] if any(slow in n for slow in SLOW) else []) for n in ENGINES],
)
def test_engine_agrees_with_open_clip(engine: str) -> None:
    (kind,) = {peer.kind for peer in peers_of("encode_image") if peer.name == engine}
    error = error_of("encode_image", engine)
    assert error < (QUANTIZED if kind == "quantized" else 1e-5)
    assert kind != "quantized" or error > 1e-4
    parameters_of.cache_clear()


@pytest.mark.parametrize("engine", ["evakernels frozen", "onnxruntime"])
def test_engine_of_captions_agrees_with_open_clip(engine: str) -> None:
    assert error_of("encode_text", engine) < 1e-5


def test_engine_computes_in_the_dtype_measured() -> None:
    assert 1e-4 < error_of("encode_image", "evakernels frozen", torch.bfloat16) < 0.05
    with pytest.raises(UserError, match="onnxruntime of open_clip has no"):
        error_of("encode_image", "onnxruntime of open_clip", torch.bfloat16)


def test_loader_agrees_with_tarfile() -> None:
    operation = get_operation("loader")
    shape = operation.shape("small")
    inputs = draw(operation, shape)
    expected = outputs(operation.eager, inputs)
    assert relative_error(outputs(operation.ours, inputs), expected) == 0
    if find_spec("webdataset"):
        (peer,) = peers_of("loader")
        assert relative_error(outputs(peer.build(shape), inputs), expected) == 0
