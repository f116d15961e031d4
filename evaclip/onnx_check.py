"""Check that an ONNX file computes its model's embeddings, by a probe in the file's metadata.

The probe's inputs are noise images of several scales and captions of several lengths. numpy's `RandomState` draws them
from a seed; its stream never changes. Needs numpy and onnxruntime, and no torch.
"""

import base64
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evaclip.errors import Refused, UserError
from evaclip.extras import import_extra

DEFAULT_PROVIDER = "CPUExecutionProvider"

Run = Callable[[NDArray[Any]], NDArray[Any]]
"""Inputs to embeddings."""

_KINDS = {"float": np.float32, "float16": np.float16, "int32": np.int32, "int64": np.int64}

OPSET = 20
KEY = "evaclip.probe"
LOWEST = {"fp32": 0.9999, "fp16": 0.9999, "bf16": 0.9999, "int8": 0.99}
"""The cosine to the model's embedding in float32 that a file must reach."""
SEED, COUNT = 20, 4

_FORMAT = 1


@dataclass(frozen=True)
class Probe:
    """Inputs, and what they must give.

    Attributes:
        tower: `image` or `text`.
        shape: of one input: 3, height, width; or the context length.
        vocab_size: number of token ids; 0 for images.
        lowest: the cosine that must be reached.
        expected: float32 `[count, embed_dim]`, the model's embeddings in float32.
        seed: of the inputs.
    """

    tower: Literal["image", "text"]
    shape: tuple[int, ...]
    vocab_size: int
    lowest: float
    expected: NDArray[np.float32]
    seed: int = SEED

    def inputs(self) -> NDArray[Any]:
        """float32 `[count, 3, height, width]`, or int64 `[count, context_length]`."""
        return make_inputs(self.tower, self.shape, self.vocab_size, self.seed, len(self.expected))

    def to_metadata(self) -> dict[str, str]:
        """The entry of the file's `metadata_props`."""
        packed = base64.b64encode(zlib.compress(self.expected.astype("<f4").tobytes())).decode()
        return {KEY: json.dumps({"format": _FORMAT, **asdict(self), "expected": packed, "count": len(self.expected)})}


@dataclass(frozen=True)
class Outcome:
    """Result of a probe.

    Attributes:
        provider: execution provider of ONNX Runtime, such as `CPUExecutionProvider`.
        cosine: lowest cosine of an embedding to the expected one; nan without a result.
        apart: whether each embedding is nearest to its own among the expected ones.
        problem: why there is no result.
    """

    provider: str
    cosine: float
    apart: bool
    problem: str = ""

    def passes(self, lowest: float) -> bool:
        """Whether the cosine is at least `lowest`, and embeddings of different inputs differ."""
        return self.apart and self.cosine >= lowest

    def __str__(self) -> str:
        text = self.problem or f"{self.cosine:.7f}" + ("" if self.apart else ", the same for all inputs")
        return f"{self.provider}: {text}"


def read_probe(path: Path) -> Probe:
    """The probe of a file.

    Raises:
        UserError: the file isn't there, isn't ONNX, or holds no probe that can be read.
    """
    file = str(path)
    if not path.is_file():
        raise UserError(f"there is no file {file!r}; expected an ONNX file that `evaclip export` wrote")
    metadata = _session(path).get_modelmeta().custom_metadata_map
    if KEY not in metadata:
        raise UserError(f"{file!r} holds no probe; expected a file that `evaclip export` wrote")
    try:
        held = json.loads(metadata[KEY])
        if held.pop("format") != _FORMAT:
            raise ValueError("it is of a newer version")
        values = np.frombuffer(zlib.decompress(base64.b64decode(held["expected"])), "<f4")
        expected = values.reshape(held.pop("count"), -1)
        return Probe(**{**held, "shape": tuple(held["shape"]), "expected": expected})
    except (KeyError, TypeError, ValueError, zlib.error) as exc:
        raise UserError(f"the probe in {file!r} can't be read: {exc}; export the file again") from exc


def check(path: Path, providers: Sequence[str] = (DEFAULT_PROVIDER,)) -> list[Outcome]:
    """Run a file's probe in ONNX Runtime.

    Args:
        path: the ONNX file.
        providers: execution providers, each by itself.

    Raises:
        UserError: for a file without a probe, or a provider that isn't there.

    Example:
        `all(outcome.passes(0.9999) for outcome in check(Path("image.onnx")))`
    """
    probe, available = read_probe(path), import_extra("onnxruntime").get_available_providers()
    for provider in providers:
        if provider not in available:
            raise UserError(f"provider must be one of this onnxruntime's, {', '.join(available)}, got {provider!r}")
    return [_outcome(probe, path, provider) for provider in providers]


def require(outcomes: Sequence[Outcome], lowest: float, file: str) -> None:
    """Raise Refused if an outcome doesn't reach `lowest`."""
    failed = [outcome for outcome in outcomes if not outcome.passes(lowest)]
    if failed:
        raise Refused(
            f"{file!r} doesn't compute the model's embeddings; expected a cosine of {lowest} or more:"
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


def _outcome(probe: Probe, path: Path, provider: str) -> Outcome:
    try:
        run, inputs = run_in_onnxruntime(path, provider), probe.inputs()
        # One input alone, too: a graph may be right only for the batch size of the export.
        embeddings = np.concatenate([run(inputs[:1]), run(inputs)])
    except UserError:
        raise
    except Exception as exc:  # each provider has another exception class for unsupported graphs
        return Outcome(provider, float("nan"), False, f"can't run it: {' '.join(str(exc).split())[:200]}")
    cosine, apart = _agreement(embeddings[1:], probe.expected)
    alone, _ = _agreement(embeddings[:1], probe.expected[:1])
    return Outcome(provider, float(np.minimum(cosine, alone)), apart)


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


def make_inputs(tower: str, shape: tuple[int, ...], vocab_size: int, seed: int, count: int = COUNT) -> NDArray[Any]:
    """The inputs of a seed; see `Probe.inputs`."""
    random = np.random.RandomState(seed)
    return _images(random, count, *shape[1:]) if tower == "image" else _captions(random, count, shape[0], vocab_size)


def _agreement(found: NDArray[Any], expected: NDArray[Any]) -> tuple[float, bool]:
    """The lowest cosine of an embedding to the one expected, and whether each is nearest to its own.

    The second detects an encoder that gives every input the same vector; its cosines may be high.
    """
    if found.shape != expected.shape:
        return float("nan"), False
    a, b = (x.astype(np.float64) for x in (found, expected))
    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
        table = a @ b.T
    if not np.isfinite(table).all():
        return float("nan"), False
    return float(table.diagonal().min()), bool((table.argmax(1) == np.arange(len(table))).all())


def _images(random: np.random.RandomState, count: int, height: int, width: int) -> NDArray[np.float32]:
    total = np.zeros((count, 3, height, width))
    for cells in (2, 4, 8, 16, 32):
        noise = random.standard_normal((count, 3, cells, cells))
        rows, columns = (np.arange(side) * cells // side for side in (height, width))
        total += noise[:, :, rows][..., columns]
    return np.asarray(total / np.sqrt(5), dtype=np.float32)


def _captions(random: np.random.RandomState, count: int, length: int, vocab_size: int) -> NDArray[np.int64]:
    start, end = vocab_size - 2, vocab_size - 1
    tokens = np.zeros((count, length), dtype=np.int64)
    for row, words in zip(tokens, np.linspace(1, length - 2, count).astype(int), strict=True):
        row[: words + 2] = [start, *random.randint(1, start, words), end]
    return tokens
