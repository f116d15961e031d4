"""A tower written as ONNX, and run before anyone else does."""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import onnx
import torch
from onnx import TensorProto, helper

from evaclip.errors import UserError, unknown_name
from evaclip.model.clip import CLIP
from evaclip.model.export import exportable
from evaclip.portable.check import Outcome, check_everywhere, require
from evaclip.portable.graph import DTYPES, Dtype, Graph, save
from evaclip.portable.probe import LOWEST, SEED, Probe, make_inputs
from evaclip.portable.towers import image_graph, text_graph


@dataclass(frozen=True)
class Spec:
    """What a file is to be.

    Attributes:
        tower: which half of the model.
        normalize: whether embeddings have length 1.
        dtype: of the weights: fp32, fp16 or bf16.
        int8: whether matrix products are of 8-bit integers.
        input, output: the names of what goes in and what comes out.
        int32: whether token ids are int32, else int64.
        external: whether the weights lie in a file beside it, `NAME.data`; else they do where they are too many.
    """

    tower: Literal["image", "text"]
    normalize: bool = False
    dtype: str = "fp32"
    int8: bool = False
    input: str = "inputs"
    output: str = "embeddings"
    int32: bool = False
    external: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)
        if self.int8 and self.dtype != "fp32":
            raise UserError(f"int8 and dtype={self.dtype} don't go together; give one of them")


def write_checked(model: CLIP, spec: Spec, path: Path) -> list[Outcome]:
    """Writes a file and runs its probe in all engines that are there.

    Raises:
        Refused: one of them doesn't give the model's embeddings. The file is there then; remove it.
    """
    model = exportable(model, spec.tower)
    probe = make_probe(model, spec)
    save(build(model, spec, probe), path, spec.external)
    if spec.int8:
        from evaclip.portable.int8 import quantize

        quantize(path)
    data = path.with_name(f"{path.name}.data")
    if data.exists():
        data.chmod(path.stat().st_mode)  # onnx makes it its owner's alone
    outcomes = check_everywhere(path)
    require(outcomes, probe.lowest, path.name)
    return outcomes


def make_probe(model: CLIP, spec: Spec) -> Probe:
    """Inputs, and what the model gives for them in float32."""
    text = model.config.text
    shape = (3, *model.config.vision.image_shape) if spec.tower == "image" else (text.context_length,)
    vocab_size = 0 if spec.tower == "image" else text.vocab_size
    inputs = torch.from_numpy(make_inputs(spec.tower, shape, vocab_size, SEED))
    if model.logit_scale.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    encode = model.encode_image if spec.tower == "image" else model.encode_text
    with torch.no_grad():
        expected = encode(inputs.to(model.logit_scale.device), normalize=spec.normalize).cpu().numpy()
    return Probe(spec.tower, shape, vocab_size, LOWEST["int8" if spec.int8 else spec.dtype], expected)


def build(model: CLIP, spec: Spec, probe: Probe) -> onnx.ModelProto:
    """The file's contents."""
    graph = Graph(cast(Dtype, spec.dtype))
    kind = TensorProto.FLOAT if spec.tower == "image" else TensorProto.INT32 if spec.int32 else TensorProto.INT64
    entry = helper.make_tensor_value_info(spec.input, kind, ["batch", *probe.shape])
    towers: dict[str, Any] = {"image": (image_graph, model.visual), "text": (text_graph, model.text)}
    write, tower = towers[spec.tower]
    output = graph.cast(write(graph, tower, spec.input), "float32")
    if spec.normalize:
        length = graph.op("ReduceL2", output, graph.integers(-1), keepdims=1)
        output = graph.op("Div", output, graph.op("Max", length, graph.scalar(1e-12)))
    facts = {f"evaclip.{name}": str(value) for name, value in asdict(spec).items()}
    return graph.model(entry, output, spec.output, probe.expected.shape[1], {**facts, **probe.to_metadata()})
