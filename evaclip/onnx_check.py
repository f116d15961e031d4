"""Check that an ONNX file computes its model's embeddings, by a probe in the file's metadata.

The probe is the model's float32 embeddings of four inputs, noise images or captions. numpy's `RandomState` draws the
inputs again from a seed; its stream never changes. Needs numpy and onnxruntime, and no torch.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaclip.errors import Refused, UserError
from evaclip.extras import import_extra

DEFAULT_PROVIDER = "CPUExecutionProvider"
KEY = "evaclip.probe"
"""Key of the probe in a file's metadata."""
LOWEST = {"fp32": 0.9999, "fp16": 0.9999, "bf16": 0.9999, "int8": 0.99}
"""The cosine to the model's embedding in float32 that a file must reach."""

Run = Callable[[NDArray[Any]], NDArray[Any]]
"""Inputs to embeddings."""

_SEED, _COUNT = 20, 4
_LENGTHS = 0.1
"""Largest relative difference of an embedding's length, which the cosine doesn't see."""
_KINDS = {"float": np.float32, "float16": np.float16, "int32": np.int32, "int64": np.int64}


@dataclass(frozen=True)
class Outcome:
    """Result of a probe.

    Attributes:
        provider: execution provider of ONNX Runtime, such as `CPUExecutionProvider`.
        cosine: lowest cosine of an embedding to the expected one; nan without a result.
        lowest: the cosine that must be reached.
        problem: anything else that is wrong; empty if nothing is.
    """

    provider: str
    cosine: float
    lowest: float
    problem: str = ""

    @property
    def passes(self) -> bool:
        """Whether the file computes the model's embeddings."""
        return self.cosine >= self.lowest and not self.problem

    def __str__(self) -> str:
        return f"{self.provider}: {self.cosine:.7f}" + (f", {self.problem}" if self.problem else "")


def check(path: Path, providers: Sequence[str] = (DEFAULT_PROVIDER,)) -> list[Outcome]:
    """Run a file's probe in ONNX Runtime, with all its inputs and with the first alone.

    Args:
        path: the ONNX file.
        providers: execution providers, each by itself.

    Raises:
        UserError: for a file without a probe, or a provider that isn't there.

    Example:
        `all(outcome.passes for outcome in check(Path("image.onnx")))`
    """
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}; expected an ONNX file that `evaclip export` wrote")
    available = import_extra("onnxruntime").get_available_providers()
    for provider in providers:
        if provider not in available:
            raise UserError(f"provider must be one of this onnxruntime's, {', '.join(available)}, got {provider!r}")
    session = _session(path)
    metadata = session.get_modelmeta().custom_metadata_map
    if KEY not in metadata:
        raise UserError(f"{str(path)!r} holds no probe; expected a file that `evaclip export` wrote")
    try:
        probe = json.loads(metadata[KEY])
        expected, lowest = np.array(probe["expected"], np.float64), float(probe["lowest"])
        inputs = make_inputs(session.get_inputs()[0].shape[1:], probe["vocab_size"])
    except (KeyError, TypeError, ValueError) as exc:
        raise UserError(f"the probe in {str(path)!r} can't be read: {exc}; export the file again") from exc
    return [_outcome(path, provider, inputs, expected, lowest) for provider in providers]


def require(outcomes: Sequence[Outcome], file: str) -> None:
    """Raise Refused if an outcome doesn't pass."""
    if failed := [outcome for outcome in outcomes if not outcome.passes]:
        raise Refused(
            f"{file!r} doesn't compute the model's embeddings; expected a cosine of {failed[0].lowest} or more:"
            f" {'; '.join(map(str, failed))}"
        )


def run_in_onnxruntime(path: Path, provider: str = DEFAULT_PROVIDER, threads: int = 0) -> Run:
    """Open a file in a session of ONNX Runtime, and return the function from inputs to embeddings.

    Args:
        path: the ONNX file, of one input and one output.
        provider: execution provider.
        threads: CPU threads; 0 for ONNX Runtime's own number.

    Raises:
        RuntimeError: the provider can't be started.
        UserError: the file can't be read.
    """
    session = _session(path, provider, threads)
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"{provider} couldn't be started; onnxruntime fell back to {session.get_providers()[0]}")
    (entry,) = session.get_inputs()
    kind = _KINDS[entry.type.removeprefix("tensor(").removesuffix(")")]
    return lambda inputs: np.asarray(session.run(None, {entry.name: inputs.astype(kind, copy=False)})[0])


def make_inputs(shape: Sequence[int], vocab_size: int) -> NDArray[Any]:
    """Draw the inputs of a probe.

    Args:
        shape: of one input: 3, height, width; or the context length.
        vocab_size: number of token ids; not used for images.

    Returns:
        float32 noise images of several scales `[4, 3, height, width]`, or int64 captions of several lengths
        `[4, context_length]`.
    """
    random = np.random.RandomState(_SEED)
    if len(shape) == 3:
        images = np.zeros((_COUNT, *shape))
        for cells in (2, 4, 8, 16, 32):
            noise = random.standard_normal((_COUNT, 3, cells, cells))
            rows, columns = (np.arange(side) * cells // side for side in shape[1:])
            images += noise[:, :, rows][..., columns]
        return np.asarray(images / np.sqrt(5), dtype=np.float32)
    start, end = vocab_size - 2, vocab_size - 1
    tokens = np.zeros((_COUNT, *shape), dtype=np.int64)
    for row, words in zip(tokens, np.linspace(1, shape[0] - 2, _COUNT).astype(int), strict=True):
        row[: words + 2] = [start, *random.randint(1, start, words), end]
    return tokens


def _outcome(path: Path, provider: str, inputs: NDArray[Any], expected: NDArray[np.float64], lowest: float) -> Outcome:
    try:
        run = run_in_onnxruntime(path, provider)
        # One input alone, too: a graph may be right only for the batch size of the export.
        found = np.concatenate([run(inputs[:1]), run(inputs)]).astype(np.float64)
        lengths, wanted = (np.linalg.norm(x, axis=1, keepdims=True) for x in (found, expected))
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines = (found / lengths) @ (expected / wanted).T
    except UserError:
        raise
    except Exception as exc:  # each provider has another exception class for unsupported graphs
        return Outcome(provider, float("nan"), lowest, f"can't run it: {' '.join(str(exc).split())[:200]}")
    own, problem = [0, *range(_COUNT)], ""
    if (cosines.argmax(1) != own).any():
        problem = "embeddings of different inputs are confused"  # their cosines may be high
    elif (abs(lengths / wanted[own] - 1) > _LENGTHS).any():
        problem = "embeddings have another length"
    return Outcome(provider, float(cosines[range(len(own)), own].min()), lowest, problem)


def _session(path: Path, provider: str = DEFAULT_PROVIDER, threads: int = 0) -> Any:
    ort = import_extra("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(path), options, providers=[provider])
    except Exception as exc:
        if type(exc).__name__ in ("InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile"):
            raise UserError(f"{str(path)!r} can't be read as ONNX: {' '.join(str(exc).split())}") from exc
        raise
