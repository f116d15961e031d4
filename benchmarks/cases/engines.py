"""Other engines of `encode_image` and `encode_text`, on the same weights and samples.

The engines are this library's prepacked, compiled and int8 towers, torch.compile with frozen weights, and runtimes of
ONNX files: this library's export, or torch.onnx's export of open_clip's model. OpenVINO computes
with weights of 16 bits in float32, and so does ONNX Runtime where it has no kernels.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.candidates import compile_frozen
from benchmarks.cases._open_clip import PlainClip
from benchmarks.cases.models import parameters_of, pixels_of
from benchmarks.operation import Function, Kind, peer
from benchmarks.shapes import Shape, short_names
from evaclip import CLIP, create_model
from evaclip.errors import UserError
from evaclip.runtime.encoder import computed_dtype
from evaclip.weights import to_open_clip
from evakernels.nn import freeze

Tower = Literal["image", "text"]
Run = Callable[[Tensor], Any]
"""Samples to embeddings: a tensor, or an array on the host."""
INT8 = "int8"
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_DTYPES = {name: dtype for dtype, name in PRECISIONS.items()}
_ONNX, _PLAIN = ("onnx", "onnxscript"), ("onnx", "onnxscript", "open_clip_torch", "timm")


@dataclass(frozen=True)
class Subject:
    """The measured tower; `folder` holds its ONNX files, each written once."""

    model: CLIP
    tower: Tower
    folder: Any = field(default_factory=tempfile.TemporaryDirectory)

    def our_tower(self, precision: str) -> nn.Module:
        """A copy of this library's tower."""
        model = copy.deepcopy(self.model).to(_DTYPES[precision])
        return model.visual if self.tower == "image" else model.text

    def plain_tower(self, precision: str) -> nn.Module:
        """open_clip's tower with the same weights; of images it is timm's."""
        plain = PlainClip(self.model.config, torch.device("cpu"))
        plain.load_state_dict(to_open_clip(copy.deepcopy(self.model).state_dict()), assign=True)
        tower = plain.visual["trunk"] if self.tower == "image" else plain.text
        # Weights require gradients, as in most programs: without them torch multiplies some inputs in bfloat16 at a
        # tenth of the speed.
        return tower.to(_DTYPES[precision]).eval().requires_grad_()

    def onnx(self, precision: str, plain: bool) -> Path:
        """The ONNX file of this library's export, or of torch.onnx's export of open_clip's model."""
        path = Path(self.folder.name, f"{'plain' if plain else 'ours'}-{precision}.onnx")
        if not path.exists():
            part = path.with_name(f"part-{path.name}")
            (self._export_plain if plain else self._export_ours)(precision, part)
            part.rename(path)
        return path

    def _export_ours(self, precision: str, path: Path) -> None:
        from evaclip.export import export

        kind: dict[str, Any] = {"int8": True} if precision == INT8 else {"dtype": precision}
        export(copy.deepcopy(self.model), self.tower, path, **kind)

    def _export_plain(self, precision: str, path: Path) -> None:
        from evaclip.export import quantize

        dense = "fp32" if precision == INT8 else precision
        config = self.model.config
        example = torch.zeros(2, 3, *config.vision.image_shape, dtype=_DTYPES[dense])
        if self.tower == "text":
            example = torch.zeros(2, config.text.context_length, dtype=torch.int64)
        batch = ({0: torch.export.Dim("batch")},)
        module = self.plain_tower(dense)
        program = torch.onnx.export(module, (example,), dynamo=True, dynamic_shapes=batch, verbose=False)
        if program is None:
            raise UserError("torch.onnx made no program")
        program.save(path)
        if precision == INT8:
            quantize(path)


@lru_cache(maxsize=2)  # both towers of one model
def _subject(model: str, pixels: int, tower: Tower) -> Subject:
    clip = create_model(short_names()[model], vision={"image_size": pixels}).eval().requires_grad_(False)
    clip.load_state_dict(parameters_of(model, pixels, torch.device("cpu")), strict=False)
    return Subject(clip, tower)


def _engine(
    name: str,
    build: Callable[[Subject, str], Run],
    *needs: str,
    kind: Kind = "peer",
    towers: tuple[Tower, ...] = ("image", "text"),
    precisions: tuple[str, ...] = tuple(_DTYPES),
) -> None:
    """Register an engine on both towers; `quantized` engines compute in int8 for every measured dtype."""
    for tower in towers:

        @peer(f"encode_{tower}", name, devices=("cpu",), package=needs[0], needs=needs[1:], kind=kind)
        def for_shape(shape: Shape, tower: Tower = tower) -> Function:
            runs: dict[str, Run] = {}

            def encode(pair: Any, parameters: list[Tensor], samples: Tensor) -> Tensor:
                dtype = parameters[0].dtype
                precision = INT8 if kind == "quantized" else PRECISIONS[dtype]
                if precision not in runs:
                    if precision not in (*precisions, INT8):
                        raise UserError(f"{name} has no {dtype}")
                    runs[precision] = build(_subject(shape.model, pixels_of(shape), tower), precision)
                return torch.as_tensor(runs[precision](samples)).to(dtype)

            return encode


def _in_torch(module: Callable[[Tensor], Tensor]) -> Run:
    def run(samples: Tensor) -> Tensor:
        with torch.inference_mode():
            return module(samples)

    return run


def _frozen(subject: Subject, precision: str) -> Run:
    return _in_torch(freeze(subject.our_tower(precision)))


def _int8(subject: Subject, precision: str) -> Run:
    dtype = computed_dtype(precision)
    # The first block stays dense, as in `evaclip.Encoder`.
    tower = freeze(subject.our_tower(PRECISIONS[dtype]), int8=lambda parameter: "blocks.0." not in parameter)
    return _in_torch(lambda samples: tower(samples.to(dtype) if samples.is_floating_point() else samples))


def _our_compiled(subject: Subject, precision: str) -> Run:
    return _in_torch(torch.compile(subject.our_tower(precision)))


def _freezing(subject: Subject, precision: str, backend: str = "inductor") -> Run:
    from torch._dynamo import config

    # Each size and dtype of either tower is a compiled form of the same code; torch's default limit is eight.
    config.recompile_limit = 64
    return _in_torch(compile_frozen(subject.plain_tower(precision), backend, fullgraph=True))


def _onnxruntime(subject: Subject, precision: str, plain: bool = False) -> Run:
    from evaclip.onnx_check import run_in_onnxruntime

    if plain and (subject.tower, precision) == ("text", "fp16"):
        raise UserError("onnxruntime 1.32.0 ends the process when it loads this file")
    run = run_in_onnxruntime(subject.onnx(precision, plain), threads=torch.get_num_threads())
    return lambda samples: run(_to_array(samples))


def _openvino(subject: Subject, precision: str, plain: bool = False) -> Run:
    import openvino

    # By default OpenVINO computes in bfloat16 on a CPU that has it, whatever the file's dtype is.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(str(subject.onnx(precision, plain)), "CPU", options)
    kind = compiled.input(0).element_type.to_dtype()
    return lambda samples: np.asarray(compiled(_to_array(samples).astype(kind, copy=False))[0])


def _to_array(samples: Tensor) -> Any:
    return (samples.float() if samples.is_floating_point() else samples).numpy()


_engine("evakernels frozen", _frozen, "torch", kind="ours")
_engine("evakernels compiled", _our_compiled, "torch", kind="ours", towers=("image",))
_engine("evakernels int8", _int8, "torch", kind="quantized")
_engine("compile-freezing", _freezing, "torch")
_engine("zentorch", partial(_freezing, backend="zentorch"), "zentorch", precisions=("fp32", "bf16"))
for _name, _run in (("onnxruntime", _onnxruntime), ("openvino", _openvino)):
    _engine(_name, _run, _name, "onnxruntime", *_ONNX)
    _engine(f"{_name} int8", _run, _name, "onnxruntime", *_ONNX, kind="quantized")
    _of_open_clip, _needs = partial(_run, plain=True), ("onnxruntime", *_PLAIN)
    _engine(f"{_name} of open_clip", _of_open_clip, _name, *_needs, precisions=("fp32", "fp16"))
    _engine(f"{_name} of open_clip int8", _of_open_clip, _name, *_needs, kind="quantized")
