"""What computes the embeddings of a model: this library, open_clip's model in PyTorch, and runtimes of ONNX files."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.cases._open_clip import PlainClip
from benchmarks.cases.models import check_comparable
from benchmarks.operation import Kind
from evaclip import CLIP, Encoder
from evaclip.errors import UserError
from evaclip.loading import LoadedModel
from evaclip.machine import version_of
from evaclip.runtime.encoder import PRECISIONS
from evaclip.weights import to_open_clip

Array = NDArray[Any]
TOWERS: tuple[Literal["image", "text"], ...] = ("image", "text")
DTYPES = ("fp32", "bf16", "fp16", "int8")


@dataclass(frozen=True)
class Batch:
    """Some inputs.

    Attributes:
        given: as `Encoder` takes them: preprocessed pictures float32 `[3, height, width]`, or strings.
        tensor: the pictures `[n, 3, height, width]`, or token ids int64 `[n, context_length]`.
    """

    given: list[Any]
    tensor: Tensor

    @cached_property
    def array(self) -> Array:
        """`tensor` for numpy."""
        return self.tensor.numpy()


Run = Callable[[Batch], Array]
"""A batch to embeddings `[n, dim]` in the memory of the host."""


@dataclass(frozen=True)
class Subject:
    """The tower that is measured.

    Attributes:
        loaded: the model, in float32 on the CPU; engines leave it as it is.
        folder: for ONNX files, each of which is written once.
    """

    loaded: LoadedModel
    tower: Literal["image", "text"]
    device: str
    folder: Path

    @property
    def example(self) -> Tensor:
        """Two inputs; one is a size that programs take for a constant."""
        config = self.loaded.model.config
        if self.tower == "image":
            return torch.zeros(2, 3, *config.vision.image_shape)
        return torch.zeros(2, config.text.context_length, dtype=torch.int64)

    def ours(self) -> CLIP:
        """A copy of the model."""
        return copy.deepcopy(self.loaded.model)

    def plain(self, dtype: str, device: str) -> nn.Module:
        """open_clip's tower with the same weights; for images it is timm's."""
        check_comparable(f"model {self.loaded.name!r}", self.loaded.model.config)
        plain = PlainClip(self.loaded.model.config, torch.device("cpu"))
        plain.load_state_dict(to_open_clip(self.ours().state_dict()), assign=True)
        tower = plain.visual["trunk"] if self.tower == "image" else plain.text
        # With the gradients that most programs leave on: by weights without any torch multiplies some inputs in
        # bfloat16 at a tenth of the speed.
        return tower.to(device, PRECISIONS[dtype]).eval().requires_grad_()


@dataclass(frozen=True)
class Engine:
    """One way to compute embeddings.

    Attributes:
        name: how it is shown and asked for.
        packages: the distributions that it needs; the first one's version is shown.
        dtypes: those that it has.
        build: makes what runs a subject in a dtype.
        towers, devices: where it runs.
    """

    name: str
    kind: Kind
    packages: tuple[str, ...]
    dtypes: tuple[str, ...]
    build: Callable[[Subject, str], Run]
    towers: tuple[str, ...] = TOWERS
    devices: tuple[str, ...] = ("cpu", "cuda")

    def absence(self, subject: Subject) -> str | None:
        """Why it can't be measured here; None if it can."""
        missing = [package for package in self.packages if version_of(package) is None]
        if missing:
            return f"not installed: pip install {' '.join(missing)}"
        for what, given, known in (("tower", subject.tower, self.towers), ("device", subject.device, self.devices)):
            if given not in known:
                return f"has no {given} {what}" if what == "tower" else f"runs on {' and '.join(known)} only"
        return None


def _evaclip(subject: Subject, dtype: str, compile: bool = False) -> Run:
    loaded = replace(subject.loaded, model=subject.ours())
    encoder = Encoder(loaded, device=subject.device, precision=dtype, batch_size=256, compile=compile)
    encode = encoder.images if subject.tower == "image" else encoder.texts
    return lambda batch: encode(batch.given).numpy()


def _open_clip(subject: Subject, dtype: str) -> Run:
    return _in_torch(subject.plain(dtype, subject.device), subject, dtype)


def _compiled(subject: Subject, dtype: str, freezing: bool = False, backend: str = "inductor") -> Run:
    from torch._dynamo import config as dynamo
    from torch._inductor import config

    if backend == "zentorch":
        import zentorch  # noqa: F401, which registers it

    # Each size and dtype of either tower is a form of the same code, of which torch makes eight and then fails.
    dynamo.recompile_limit = 64
    # Options tell apart what was compiled with and without them; dynamo, too, asks whether weights are frozen.
    options: dict[str, Any] | None = {"freezing": True} if freezing and backend == "inductor" else None
    plain = subject.plain(dtype, subject.device)
    module = torch.compile(plain, fullgraph=True, dynamic=False, options=options, backend=backend)
    run = _in_torch(module, subject, dtype)

    def patched(batch: Batch) -> Array:
        # The last is what zentorch sets, for everything that is compiled afterwards.
        with config.patch(freezing=freezing, joint_custom_post_pass=None):
            return run(batch)

    return patched


def _in_torch(module: Callable[[Tensor], Tensor], subject: Subject, dtype: str) -> Run:
    kind = PRECISIONS[dtype] if subject.tower == "image" else torch.int64

    def run(batch: Batch) -> Array:
        with torch.inference_mode():
            return module(batch.tensor.to(subject.device, kind)).float().cpu().numpy()

    return run


def _onnxruntime(subject: Subject, dtype: str, plain: bool = False) -> Run:
    from evaclip.onnx_check import run_in_onnxruntime

    if plain and (subject.tower, dtype) == ("text", "fp16"):
        raise UserError("onnxruntime 1.32.0 ends the process when it loads this file")
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[subject.device]
    run = run_in_onnxruntime(_file(subject, dtype, plain), provider, torch.get_num_threads())
    return lambda batch: run(batch.array)


def _openvino(subject: Subject, dtype: str, plain: bool = False) -> Run:
    try:
        import openvino
    except ModuleNotFoundError as exc:
        raise UserError("the package openvino is not installed: pip install openvino") from exc
    # By default OpenVINO computes in bfloat16 on a CPU that has it, whatever the file's dtype is.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(str(_file(subject, dtype, plain)), "CPU", options)
    kind = compiled.input(0).element_type.to_dtype()
    return lambda batch: np.asarray(compiled(batch.array.astype(kind, copy=False))[0])


def _file(subject: Subject, dtype: str, plain: bool) -> Path:
    """The ONNX file of this library, or that which torch.onnx makes of open_clip's model."""
    path = subject.folder / f"{subject.tower}-{'plain' if plain else 'ours'}-{dtype}.onnx"
    if not path.exists():
        part = path.with_name(f"part-{path.name}")
        (_export_plain if plain else _export_ours)(subject, dtype, part)
        part.rename(path)
    return path


def _export_ours(subject: Subject, dtype: str, path: Path) -> None:
    from evaclip.export import export

    kind: dict[str, Any] = {"int8": True} if dtype == "int8" else {"dtype": dtype}
    export(subject.loaded.model, subject.tower, path, **kind)


def _export_plain(subject: Subject, dtype: str, path: Path) -> None:
    int8, dtype = dtype == "int8", "fp32" if dtype == "int8" else dtype
    module = subject.plain(dtype, "cpu")
    example = subject.example.to(PRECISIONS[dtype]) if subject.tower == "image" else subject.example
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(module, (example,), dynamo=True, dynamic_shapes=batch, verbose=False)
    if program is None:
        raise UserError("torch.onnx made no program")
    program.save(path)
    if int8:
        from evaclip.export import quantize

        quantize(path)


_TORCH = ("fp32", "bf16", "fp16")
_PLAIN = ("open_clip_torch", "timm")
_OURS, _THEIRS = ("onnx", "onnxscript"), ("onnx", "onnxscript", *_PLAIN)

ENGINES = (
    Engine("evaclip", "ours", ("evakernels",), DTYPES, _evaclip),
    Engine("evaclip-compile", "ours", ("evakernels",), _TORCH, partial(_evaclip, compile=True), towers=("image",)),
    Engine("open_clip", "baseline", _PLAIN, _TORCH, _open_clip),
    Engine("compile", "peer", ("torch", *_PLAIN), _TORCH, _compiled),
    Engine("compile-freezing", "peer", ("torch", *_PLAIN), _TORCH, partial(_compiled, freezing=True)),
    Engine(
        "zentorch",
        "peer",
        ("zentorch", *_PLAIN),
        ("fp32", "bf16"),
        partial(_compiled, freezing=True, backend="zentorch"),
        devices=("cpu",),
    ),
    Engine("onnxruntime", "ours", ("onnxruntime", *_OURS), DTYPES, _onnxruntime),
    Engine(
        "onnxruntime-open_clip",
        "peer",
        ("onnxruntime", *_THEIRS),
        ("fp32", "fp16", "int8"),
        partial(_onnxruntime, plain=True),
    ),
    Engine("openvino", "ours", ("openvino", "onnxruntime", *_OURS), DTYPES, _openvino, devices=("cpu",)),
    Engine(
        "openvino-open_clip",
        "peer",
        ("openvino", "onnxruntime", *_THEIRS),
        ("fp32", "fp16", "int8"),
        partial(_openvino, plain=True),
        devices=("cpu",),
    ),
)
"""Weights of 16 bits are computed in float32 by OpenVINO, and by ONNX Runtime where it has no kernels."""
