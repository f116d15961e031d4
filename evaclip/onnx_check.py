"""Does an ONNX file compute its model's embeddings? A probe in the file's metadata says which they are.

The probe's inputs are noise images of several scales and captions of several lengths. numpy's `RandomState` draws them
from a seed; its stream never changes. Needs numpy and onnxruntime (openvino for that engine), and no torch.
"""

import base64
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evaclip.errors import Refused, UserError
from evaclip.extras import with_remedy

Engine = Literal["onnxruntime", "openvino"]
ENGINES: tuple[Engine, ...] = ("onnxruntime", "openvino")
DEFAULT_PROVIDER = "CPUExecutionProvider"

LEVELS = {"none": "DISABLE_ALL", "basic": "ENABLE_BASIC", "extended": "ENABLE_EXTENDED", "all": "ENABLE_ALL"}
Run = Callable[[NDArray[Any]], NDArray[Any]]
"""Inputs to embeddings."""

_KINDS = {"float": np.float32, "float16": np.float16, "int32": np.int32, "int64": np.int64}


OPSET = 20
KEY = "evaclip.probe"
LOWEST = {"fp32": 0.9999, "fp16": 0.9999, "bf16": 0.9999, "int8": 0.99}
"""The cosine to the model's embedding in float32 that a file must reach in every engine."""
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

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], file: str) -> "Probe":
        """The probe of a file.

        Raises:
            UserError: the file has none, or one that can't be read.
        """
        if KEY not in metadata:
            raise UserError(f"{file!r} holds no probe; expected a file that `evaclip export` wrote")
        try:
            held = json.loads(metadata[KEY])
            if held.pop("format") != _FORMAT:
                raise ValueError("it is of a newer version")
            values = np.frombuffer(zlib.decompress(base64.b64decode(held["expected"])), "<f4")
            expected = values.reshape(held.pop("count"), -1)
            return cls(**{**held, "shape": tuple(held["shape"]), "expected": expected})
        except (KeyError, TypeError, ValueError, zlib.error) as exc:
            raise UserError(f"the probe in {file!r} can't be read: {exc}; export the file again") from exc


@dataclass(frozen=True)
class Outcome:
    """What one engine made of the probe.

    Attributes:
        engine: `onnxruntime` or `openvino`, with its version.
        provider: what ran it, such as `CPUExecutionProvider`.
        level: of graph optimisation.
        cosine: the lowest of an embedding to the one expected; nan for no answer.
        apart: whether each embedding is nearest to its own among those expected.
        problem: why there is no answer.
    """

    engine: str
    provider: str
    level: str
    cosine: float
    apart: bool
    problem: str = ""

    def passes(self, lowest: float) -> bool:
        """Whether the cosine is at least `lowest`, and inputs are told apart."""
        return self.apart and self.cosine >= lowest


def read_probe(path: Path) -> Probe:
    """The probe of a file.

    Raises:
        UserError: the file isn't there, isn't ONNX, or holds no probe.
    """
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}; expected an ONNX file that `evaclip export` wrote")
    session = _session(path, "none", [DEFAULT_PROVIDER])
    return Probe.from_metadata(session.get_modelmeta().custom_metadata_map, str(path))


def check(path: Path, engine: Engine = "onnxruntime", providers: Sequence[str] = (DEFAULT_PROVIDER,)) -> list[Outcome]:
    """Runs a file's probe at every level of optimisation; of OpenVINO there is one.

    Args:
        path: the ONNX file.
        engine: what runs it.
        providers: execution providers of ONNX Runtime, each by itself; devices of OpenVINO.

    Raises:
        UserError: for a file without a probe, or a provider or an engine that isn't there.

    Example:
        `all(outcome.passes(0.9999) for outcome in check(Path("image.onnx")))`
    """
    probe = read_probe(path)
    runs = _openvino_runs(path) if engine == "openvino" else _onnxruntime_runs(path, providers)
    return [_outcome(probe, *run) for run in runs]


def check_everywhere(path: Path) -> list[Outcome]:
    """`check` in ONNX Runtime on the CPU, and in OpenVINO where it is installed."""
    engines = ENGINES if find_spec("openvino") else ENGINES[:1]
    return [outcome for engine in engines for outcome in check(path, engine)]


def require(outcomes: Sequence[Outcome], lowest: float, file: str) -> None:
    """Raises Refused where one of them doesn't reach `lowest`."""
    failed = [outcome for outcome in outcomes if not outcome.passes(lowest)]
    if failed:
        where = "; ".join(f"{each.engine} {each.provider} {each.level}: {_reason(each)}" for each in failed)
        raise Refused(
            f"{file!r} doesn't compute the model's embeddings; expected a cosine of {lowest} or more: {where}"
        )


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes in lines, aligned."""
    rows = [("engine", "provider", "level", "cosine")]
    rows += [(each.engine, each.provider, each.level, _reason(each)) for each in outcomes]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def run_in_onnxruntime(path: Path, level: str, provider: str = DEFAULT_PROVIDER, threads: int = 0) -> Run:
    """A file in a session of ONNX Runtime.

    Args:
        path: the ONNX file, of one input and one output.
        level: of graph optimisation, one of `LEVELS`.
        provider: what runs it.
        threads: of the processor; 0 for ONNX Runtime's own number.

    Raises:
        RuntimeError: the provider is there, but can't be started.
        UserError: the file can't be read.
    """
    session = _session(path, level, [provider], threads)
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"{provider} couldn't be started; onnxruntime fell back to {session.get_providers()[0]}")
    (entry,) = session.get_inputs()
    kind = _KINDS[entry.type.removeprefix("tensor(").removesuffix(")")]
    return lambda inputs: np.asarray(session.run(None, {entry.name: inputs.astype(kind, copy=False)})[0])


def run_in_openvino(path: Path, threads: int = 0) -> Run:
    """A file compiled by OpenVINO for the CPU, with so many threads; 0 for OpenVINO's own number.

    By itself a CPU that has bfloat16 computes in it, and what the file says is then not what is run.
    """
    openvino = _openvino()
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    kind = compiled.input(0).element_type.to_dtype()
    return lambda inputs: np.asarray(compiled(inputs.astype(kind, copy=False))[0])


def _reason(outcome: Outcome) -> str:
    told = outcome.problem or f"{outcome.cosine:.7f}"
    return told if outcome.apart or outcome.problem else f"{told}, inputs aren't told apart"


def _outcome(probe: Probe, engine: str, provider: str, level: str, load: Callable[[], Run]) -> Outcome:
    try:
        run, inputs = load(), probe.inputs()
        # One alone, too: a graph may be right for the batch that it was made with only.
        found = np.concatenate([run(inputs[:1]), run(inputs)])
    except UserError:
        raise
    except Exception as exc:  # Each engine has its own, for graphs that it can't run.
        return Outcome(
            engine, provider, level, float("nan"), False, f"can't run it: {' '.join(str(exc).split())[:200]}"
        )
    cosine, apart = agreement(found[1:], probe.expected)
    alone, _ = agreement(found[:1], probe.expected[:1])
    return Outcome(engine, provider, level, float(np.minimum(cosine, alone)), apart)


def _onnxruntime_runs(path: Path, providers: Sequence[str]) -> Iterator[tuple[str, str, str, Callable[[], Run]]]:
    ort = _onnxruntime()
    available = ort.get_available_providers()
    for provider in providers:
        if provider not in available:
            raise UserError(f"provider {provider!r} isn't there; this onnxruntime has: {', '.join(available)}")
    for provider in providers:
        for level in LEVELS:
            yield f"onnxruntime {ort.__version__}", provider, level, partial(run_in_onnxruntime, path, level, provider)


def _session(path: Path, level: str, providers: list[str], threads: int = 0) -> Any:
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{LEVELS[level]}")
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(path), options, providers=providers)
    except Exception as exc:
        # A file that is no ONNX at all, which the levels needn't be tried for.
        if type(exc).__name__ in ("InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile"):
            raise UserError(f"{str(path)!r} can't be read as ONNX: {' '.join(str(exc).split())}") from exc
        raise


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as exc:
        raise with_remedy(exc) from exc
    return onnxruntime


def _openvino() -> Any:
    try:
        import openvino
    except ModuleNotFoundError as exc:
        raise UserError("the package openvino is not installed: pip install openvino") from exc
    return openvino


def _openvino_runs(path: Path) -> Iterator[tuple[str, str, str, Callable[[], Run]]]:
    version = _openvino().__version__.split("-")[0]
    yield f"openvino {version}", "CPU", "default", partial(run_in_openvino, path)


def make_inputs(tower: str, shape: tuple[int, ...], vocab_size: int, seed: int, count: int = COUNT) -> NDArray[Any]:
    """The inputs of a seed; see `Probe.inputs`."""
    random = np.random.RandomState(seed)
    return _pictures(random, count, *shape[1:]) if tower == "image" else _captions(random, count, shape[0], vocab_size)


def cosines(found: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    """`[n, m]` of the rows of both; not a number where a row holds one that isn't, or only zeros."""
    a, b = (x.astype(np.float64) for x in (found, expected))
    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
        return np.asarray(a @ b.T)


def agreement(found: NDArray[Any], expected: NDArray[Any]) -> tuple[float, bool]:
    """The lowest cosine of an embedding to the one expected, and whether each is nearest to its own.

    The second tells an encoder that gives every input the same vector, whose cosines may be high.
    """
    if found.shape != expected.shape:
        return float("nan"), False
    table = cosines(found, expected)
    if not np.isfinite(table).all():
        return float("nan"), False
    return float(table.diagonal().min()), bool((table.argmax(1) == np.arange(len(table))).all())


def _pictures(random: np.random.RandomState, count: int, height: int, width: int) -> NDArray[np.float32]:
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
