"""`embed`: images and captions to embeddings by each inference engine, on the same weights and samples.

An engine starts from preprocessed pixels or token ids, but `Encoder`, fastembed and sentence-transformers from what
their public methods take: captions as strings, and for the latter two also PIL images of the model's size. ONNX files
are this library's export, or torch.onnx's export of open_clip's model. The truth is open_clip's model in float64.
"""

import copy
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.candidates import compile_frozen
from benchmarks.cases._inputs import CAPTIONS, photographs
from benchmarks.cases._open_clip import PlainClip
from benchmarks.cases.models import check_comparable, parameters_of, pixels_of, tower_work
from benchmarks.operation import EMBED, Draw, Inputs, Operation, peer, register
from benchmarks.shapes import Shape, short_names
from evaclip import CLIP, Encoder, create_model
from evaclip.errors import UserError
from evaclip.loading import LoadedModel
from evaclip.runtime.encoder import INT8, PRECISIONS, computed_dtype
from evaclip.tokenizer import Tokenizer
from evaclip.transforms import EvalTransform, image_transform
from evaclip.weights import to_open_clip
from evaclip.weights.for_transformers import image_processor, save_for_transformers

Tower = Literal["image", "text"]


@dataclass(frozen=True)
class Samples:
    """Samples of a tower: `tensor` has pixels or token ids, `originals` PIL images or strings."""

    tower: Tower
    tensor: Tensor
    originals: Sequence[Any]

    @property
    def array(self) -> Any:
        """`tensor` for engines outside of torch."""
        return self.tensor.numpy()


Run = Callable[[Samples], Any]
"""Samples to embeddings: a tensor or an array."""


@dataclass(frozen=True)
class Subject:
    """The measured model. `folder` holds its files, each written once; `runs` the engines that were built."""

    model: CLIP
    folder: Any = field(default_factory=tempfile.TemporaryDirectory)
    runs: dict[tuple[str, Tower], Run] = field(default_factory=dict)

    def samples(self, tower: Tower, start: int = 0, count: int = 64) -> Samples:
        """Photographs or captions from number `start` on; `count` can repeat them."""
        config = self.model.config
        if tower == "text":
            texts = [CAPTIONS[index % len(CAPTIONS)] for index in range(start, start + count)]
            return Samples("text", Tokenizer(config.text.context_length)(texts), texts)
        known = photographs(config.vision.image_shape[0])
        images = [known[index % len(known)] for index in range(start, start + count)]
        transform = EvalTransform(config.vision.image_size, config.preprocess)
        return Samples("image", torch.stack([transform(image) for image in images]), images)

    def plain_tower(self, tower: Tower, dtype: torch.dtype) -> nn.Module:
        """open_clip's tower with the same weights; of images it is timm's."""
        plain = PlainClip(self.model.config, torch.device("cpu"))
        plain.load_state_dict(to_open_clip(copy.deepcopy(self.model).state_dict()), assign=True)
        module = plain.visual["trunk"] if tower == "image" else plain.text
        # Weights require gradients, as in most programs: without them torch multiplies some inputs in bfloat16 at a
        # tenth of the speed.
        return module.to(dtype).eval().requires_grad_()

    def onnx(self, tower: Tower, precision: str = "fp32", plain: bool = False) -> Path:
        """The ONNX file of this library's export, or of torch.onnx's export of open_clip's model."""
        path = Path(self.folder.name, f"{tower}-{'plain' if plain else 'ours'}-{precision}", "model.onnx")
        if not path.exists():
            path.parent.mkdir()
            self._write_onnx(tower, path, precision, plain)
        return path

    def _write_onnx(self, tower: Tower, path: Path, precision: str, plain: bool) -> None:
        from evaclip.export import export

        if precision == INT8:
            _quantize_in_onnxruntime(self.onnx(tower, plain=plain), path)
            return
        if not plain:
            export(copy.deepcopy(self.model), tower, path, names=("input_ids", "embeddings"))
            return
        example, batch = self.samples(tower, count=2).tensor, ({0: torch.export.Dim("batch")},)
        module = self.plain_tower(tower, torch.float32)
        program = torch.onnx.export(module, (example,), dynamo=True, dynamic_shapes=batch, verbose=False)
        if program is None:
            raise UserError("torch.onnx made no program")
        program.save(path)


# --- engines: a subject, a tower and a precision to a run -----------------------------------------------------------


def _in_torch(module: Callable[[Tensor], Any], dtype: torch.dtype) -> Run:
    return lambda samples: module(samples.tensor.to(dtype) if samples.tower == "image" else samples.tensor)


def _encoder(subject: Subject, tower: Tower, precision: str) -> Run:
    config = subject.model.config
    transform, tokenizer = image_transform(config.vision, config.preprocess), Tokenizer(config.text.context_length)
    loaded = LoadedModel("benchmark", "random", copy.deepcopy(subject.model), tokenizer, transform)
    encoder = Encoder(loaded, device="cpu", precision=precision)
    if tower == "text":
        return lambda samples: encoder.texts(samples.originals)
    return lambda samples: encoder.images(samples.tensor.unbind())


def _open_clip(subject: Subject, tower: Tower, precision: str) -> Run:
    dtype = PRECISIONS[precision]
    return _in_torch(subject.plain_tower(tower, dtype), dtype)


def _freezing(subject: Subject, tower: Tower, precision: str, backend: str = "inductor") -> Run:
    from torch._dynamo import config

    # Each size and dtype of either tower is a compiled form of the same code; torch's default limit is eight.
    config.recompile_limit = 64
    dtype = PRECISIONS[precision]
    return _in_torch(compile_frozen(subject.plain_tower(tower, dtype), backend, fullgraph=True), dtype)


def _torchao(subject: Subject, tower: Tower, precision: str, compiled: bool = False) -> Run:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    dtype = computed_dtype(INT8)
    module = subject.plain_tower(tower, dtype).requires_grad_(False)
    # Without set_inductor_config: it changes how later candidates are compiled.
    quantize_(module, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return _in_torch(compile_frozen(module) if compiled else module, dtype)


def _onnxruntime(subject: Subject, tower: Tower, precision: str, plain: bool = False) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    file = subject.onnx(tower, precision, plain)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    return lambda samples: session.run(None, {entry.name: samples.array})[0]


def _quantize_in_onnxruntime(source: Path, target: Path) -> None:
    """Dynamic int8: weights have a scale per output channel, activations are scaled at run time.

    Weights take 7 of the 8 bits: processors without VNNI add pairs of products in 16 bits, which overflow with all 8.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=source.with_name(f"{source.name}.data").exists(),
        extra_options={"MatMulConstBOnly": True},
    )


def _openvino(subject: Subject, tower: Tower, precision: str, plain: bool = False) -> Run:
    """float32 by request; else OpenVINO's default precision, which is bfloat16 on a CPU that multiplies it."""
    import openvino

    core, file = openvino.Core(), subject.onnx(tower, plain=plain)
    model = _quantized_by_nncf(core.read_model(file), subject, tower) if precision == INT8 else file
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(
        model, "CPU", options | ({"INFERENCE_PRECISION_HINT": "f32"} if precision == "fp32" else {})
    )
    default = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if precision == "bf16" and default != precision:
        raise UserError(f"OpenVINO's default precision on this processor is {default}, not bf16")
    return lambda samples: compiled(samples.array)[0]


def _quantized_by_nncf(model: Any, subject: Subject, tower: Tower) -> Any:
    """Static int8, with ranges from the photographs or captions."""
    import nncf

    nncf.set_log_level(logging.ERROR)
    known = subject.samples(tower, count=8 if tower == "image" else len(CAPTIONS)).array
    return nncf.quantize(model, nncf.Dataset(np.split(known, len(known))), model_type=nncf.ModelType.TRANSFORMER)


def _fastembed(subject: Subject, tower: Tower, precision: str) -> Run:
    """This library's ONNX file under the name of a CLIP model that fastembed knows."""
    import fastembed

    folder = subject.onnx(tower).parent
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor(subject.model.config)))
    length = subject.model.config.text.context_length
    Tokenizer(length).save_pretrained(folder)
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["padding"]["pad_to_multiple_of"] = length  # the file's inputs have this length
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    kind, name = {
        "image": (fastembed.ImageEmbedding, "Qdrant/clip-ViT-B-32-vision"),
        "text": (fastembed.TextEmbedding, "Qdrant/clip-ViT-B-32-text"),
    }[tower]
    engine = kind(name, specific_model_path=str(folder), threads=torch.get_num_threads(), cuda=False)
    return lambda samples: np.stack(list(engine.embed(samples.originals)))


def _sentence_transformers(subject: Subject, tower: Tower, precision: str) -> Run:
    """The folder of `evaclip convert --to transformers`, which runs as plain PyTorch."""
    from sentence_transformers import SentenceTransformer

    folder = Path(subject.folder.name, "transformers")
    if not folder.exists():
        save_for_transformers(subject.model, folder)
    options = {"dtype": PRECISIONS[precision]}
    model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True, model_kwargs=options)
    return lambda samples: model.encode(samples.originals, convert_to_tensor=True, show_progress_bar=False)


# --- the operation --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _subject(model: str, pixels: int) -> Subject:
    clip = create_model(short_names()[model], vision={"image_size": pixels}).eval().requires_grad_(False)
    clip.load_state_dict(parameters_of(model, pixels, torch.device("cpu")), strict=False)
    return Subject(clip)


def _inputs(shape: Shape, draw: Draw) -> Inputs:
    check_comparable(f"shape {shape.name!r}", shape.config)
    if draw.dtype != torch.float32:
        raise UserError(f"--dtype of {EMBED} must be float32, of the weights, got {draw.dtype}")
    subject = _subject(shape.model, pixels_of(shape))
    tower: Tower = "text" if shape.tower == "text" else "image"
    samples = subject.samples(tower, int(draw.integers(len(CAPTIONS), 1)), shape.batch)
    module = subject.model.text if tower == "text" else subject.model.visual
    return {"subject": subject, "weights": list(module.parameters()), "samples": samples}


def _embed(
    subject: Subject,
    weights: list[Tensor],
    samples: Samples,
    *,
    name: str,
    build: Callable[[Subject, Tower, str], Run],
    precision: str = "fp32",
) -> Tensor:
    """Embeddings float32 `[samples, dim]` of length 1."""
    key = name, samples.tower
    if key not in subject.runs:
        subject.runs[key] = build(subject, samples.tower, precision)
    with torch.inference_mode():
        return F.normalize(torch.as_tensor(subject.runs[key](samples)).float(), dim=-1)


def _embed_plain(subject: Subject, weights: list[Tensor], samples: Samples) -> Tensor:
    """By open_clip; in float64 for weights of that dtype."""
    if (dtype := weights[0].dtype) != torch.float64:
        return _embed(subject, weights, samples, name="open_clip", build=_open_clip)
    return F.normalize(_in_torch(subject.plain_tower(samples.tower, dtype), dtype)(samples), dim=-1)


register(
    Operation(
        name=EMBED,
        summary="images or captions to embeddings, by each engine",
        inputs=_inputs,
        eager=_embed_plain,
        ours=partial(_embed, name="evakernels", build=_encoder),
        baseline="open_clip",
        baseline_package="open_clip_torch",
        by_request=True,
        is_model=True,
        references=False,
        compiles=False,
        work=tower_work,
        dtypes=("float32",),
        shapes={"cpu": ("eva02-b16@224 b1", "eva02-b16@224 b8", "eva02-b16:text b1", "eva02-b16:text b8")},
    )
)


def _engine(name: str, build: Callable[[Subject, Tower, str], Run], *packages: str, precisions: str) -> None:
    """Register an engine in each precision; in float32 it has no suffix."""
    for precision in precisions.split():
        full = name if precision == "fp32" else f"{name} {precision}"
        function = partial(_embed, name=full, build=build, precision=precision)
        kind = "peer" if precision == "fp32" else "quantized"

        def make(shape: Any, function: Any = function) -> Any:
            return function

        peer(EMBED, full, devices=("cpu",), kind=kind, package=packages[0], needs=packages[1:])(make)


_ONNX = ("onnx", "onnxscript", "onnxruntime")
_engine("evakernels", _encoder, "torch", precisions="bf16 int8")
_engine("open_clip", _open_clip, "open_clip_torch", precisions="bf16")
_engine("compile-freezing", _freezing, "torch", precisions="fp32 bf16")
_engine("zentorch", partial(_freezing, backend="zentorch"), "zentorch", precisions="fp32 bf16")
_engine("torchao", _torchao, "torchao", precisions="int8")
_engine("torchao compiled", partial(_torchao, compiled=True), "torchao", precisions="int8")
for _name, _plain in (("", False), (" of open_clip", True)):
    _engine(f"onnxruntime{_name}", partial(_onnxruntime, plain=_plain), "onnxruntime", *_ONNX, precisions="fp32 int8")
    _engine(f"openvino{_name}", partial(_openvino, plain=_plain), "openvino", *_ONNX, precisions="fp32 bf16")
    _engine(f"openvino{_name}", partial(_openvino, plain=_plain), "openvino", "nncf", *_ONNX, precisions="int8")
_engine("fastembed", _fastembed, "fastembed", *_ONNX, precisions="fp32")
_engine("sentence-transformers", _sentence_transformers, "sentence-transformers", precisions="fp32 bf16")
