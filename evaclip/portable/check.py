"""Does an ONNX file compute what it says? Told by the probe that it holds, in the engines of this machine.

Needs numpy and onnxruntime, and openvino where that engine is asked for; no torch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evaclip.errors import Refused, UserError
from evaclip.extras import with_remedy
from evaclip.portable.probe import Probe, agreement

Engine = Literal["onnxruntime", "openvino"]
ENGINES: tuple[Engine, ...] = ("onnxruntime", "openvino")
DEFAULT_PROVIDER = "CPUExecutionProvider"

LEVELS = {"none": "DISABLE_ALL", "basic": "ENABLE_BASIC", "extended": "ENABLE_EXTENDED", "all": "ENABLE_ALL"}
Run = Callable[[NDArray[Any]], NDArray[Any]]
"""Inputs to embeddings."""

_KINDS = {"float": np.float32, "float16": np.float16, "int32": np.int32, "int64": np.int64}


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
