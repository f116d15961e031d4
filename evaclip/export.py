"""Towers as programs that run without this library: torch.export's, or ONNX files that ONNX Runtime reproduces."""

import copy
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call

import evakernels
from evaclip.atomic import replacing, require_space, writing
from evaclip.errors import Refused, UserError, unknown_name
from evaclip.extras import import_extra
from evaclip.model.clip import CLIP
from evaclip.model.vision_model import VisionModel
from evaclip.outputs import check_output
from evaclip.packing import PackedImages, pack_images
from evakernels.nn import FrozenWeight, unfreeze

SUFFIXES = (".pt2", ".onnx")
OPSET = 20
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TowerName = Literal["image", "text"]

_LOWEST = 0.9999
"""The cosine to the model's embeddings in float32 that an ONNX file must reach."""
_LENGTHS = 0.1
"""Largest relative difference of an embedding's length, which the cosine doesn't see."""


def export(
    model: CLIP | VisionModel,
    tower: TowerName,
    target: Path,
    *,
    normalize: bool = False,
    overwrite: bool = False,
    dtype: str = "fp32",
    external: bool = False,
    names: tuple[str, str] = ("inputs", "embeddings"),
    int32: bool = False,
    max_patches: int | None = None,
) -> None:
    """Writes a program from images `[B, 3, H, W]` or token ids `[B, context_length]` to embeddings `[B, embed_dim]`.

    A `VisionModel` with a classifier becomes a program from images to logits `[B, num_classes]`.

    B is any number. An ONNX file takes float32 or int64 and returns float32 for any dtype of its weights; a causal text
    tower computes only the tokens of the longest text. The file is written only if ONNX Runtime reproduces the model's
    float32 embeddings of four inputs.

    Args:
        model: in evaluation mode; a `.pt2` computes in the dtype of its parameters.
        tower: `image` or `text`.
        target: `.pt2` for `torch.export.load`, `.onnx` for any ONNX runtime; written atomically. Weights that are too
            large for one file are in a second one, `NAME.onnx.data`.
        normalize: whether embeddings have length 1.
        overwrite: replace `target` if it exists. Files of a run or a checkpoint are never replaced.
        dtype: dtype of an ONNX file's weights: fp32; fp16, with computation in fp16; bf16, with computation in float32.
        external: always write an ONNX file's weights into the second file, which ONNX Runtime maps into memory faster.
        names: names of an ONNX file's input and output.
        int32: token ids of an ONNX file are int32, else int64.
        max_patches: a `.pt2` of an image tower takes `patches`, `positions`, `sizes` and `lengths` of `PackedImages`
            with at most this number of patches per image; None for images of one size.

    Raises:
        Refused: ONNX Runtime's embeddings have a cosine of less than 0.9999 to the model's.
        UserError: `target` can't be written, an option doesn't fit it, or a package is missing.

    Example:
        `export(model, "image", Path("image.onnx"), dtype="fp16")`
    """
    check_target(target, overwrite, dtype)
    if max_patches is not None and (tower != "image" or target.suffix != ".pt2" or max_patches < 1):
        raise UserError(
            f"max_patches must be None, or 1 or more for the image tower in a .pt2, got {max_patches} for the {tower}"
            f" tower in a {target.suffix}"
        )
    if target.suffix == ".pt2":
        program = exported(model, tower, normalize, max_patches)
        require_space(target, sum(tensor.nbytes for tensor in program.state_dict.values()))
        with writing(target), replacing(target) as temporary, temporary.open("wb") as stream:
            torch.export.save(program, stream)
        return
    with writing(target), _temporary_folder(target) as folder:
        path, model = folder / target.name, exportable(model, tower)
        _write_onnx(model, tower, path, dtype, normalize, external, names, int32)


def check_target(target: Path, overwrite: bool, dtype: str = "fp32") -> None:
    """Raises UserError for a file that `export` doesn't write."""
    if target.suffix not in SUFFIXES:
        raise UserError(f"the target must end in {' or '.join(SUFFIXES)}, got {str(target)!r}")
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    if target.suffix == ".pt2" and dtype != "fp32":
        raise UserError(f"dtype must be left out for a .pt2, which has that of the model's parameters, got {dtype}")
    for written in (target, target.with_name(f"{target.name}.data")):
        check_output(written, overwrite=overwrite)


def exported(
    model: CLIP | VisionModel, tower: TowerName, normalize: bool = False, max_patches: int | None = None
) -> ExportedProgram:
    """The program that `export` writes to a `.pt2`. Ops of evakernels are decomposed into torch's."""
    encoder = _Encoder(exportable(model, tower), tower, normalize, max_patches=max_patches).eval()
    # Of two samples: programs take a size of one for a constant.
    if max_patches is not None:
        weight, side = encoder.tower.pos_embed, encoder.tower.config.patch_size
        images = pack_images([torch.zeros(3, side, 2 * side)] * 2, side).to(weight.device, weight.dtype)
        patches, batch = {0: Dim("patches")}, {0: Dim("batch")}
        with torch.no_grad(), evakernels.as_torch_operators():
            return torch.export.export(encoder, images.tensors(), dynamic_shapes=(patches, patches, batch, batch))
    if tower == "image":
        weight = encoder.tower.pos_embed
        example = torch.zeros(2, 3, *encoder.tower.config.image_shape, dtype=weight.dtype, device=weight.device)
    else:
        device = encoder.tower.positional_embedding.device
        example = torch.zeros(2, encoder.tower.config.context_length, dtype=torch.int64, device=device)
    with torch.no_grad(), evakernels.as_torch_operators():
        return torch.export.export(encoder, (example,), dynamic_shapes=({0: Dim("batch")},))


def exportable(model: CLIP | VisionModel, tower: str) -> Any:
    """Returns the model, or a copy with dense weights if its weights are prepacked (`evakernels.nn.freeze`).

    Raises:
        UserError: for another tower, or a model that takes images of another size than its configuration.
    """
    towers = ("image",) if isinstance(model, VisionModel) else get_args(TowerName)
    if tower not in towers:
        raise unknown_name("tower", tower, towers)
    if tower == "text" and isinstance(model, CLIP) and model.config.text.hf_model_name:
        raise UserError("tower must be image for a model with a text tower of transformers, got 'text'")
    visual = _tower(model, "image")
    if (size := visual.present.image_size) != (base := visual.config.image_size):
        raise UserError(f"set_image_size({size}) is in force; call set_image_size({base}) before the model is exported")
    is_frozen = any(isinstance(weight, FrozenWeight) for weight in model.parameters())
    return unfreeze(copy.deepcopy(model)) if is_frozen else model


def _tower(model: CLIP | VisionModel, tower: TowerName) -> Any:
    if isinstance(model, VisionModel):
        return model
    return model.visual if tower == "image" else model.text


class _Encoder(nn.Module):
    """The module that is exported: a tower. `dtype`: weights of an ONNX file, None for torch.export.

    With `max_patches` it takes the tensors of packed images.
    """

    tower: Any

    def __init__(
        self,
        model: CLIP | VisionModel,
        tower: TowerName,
        normalize: bool,
        dtype: str | None = None,
        max_patches: int | None = None,
    ) -> None:
        super().__init__()
        self.tower = _tower(model, tower)
        self.normalize, self.dtype, self.max_patches = normalize, dtype, max_patches
        if dtype is not None:
            self.tower = copy.deepcopy(self.tower).to("cpu", DTYPES[dtype])

    def forward(self, inputs: Any, positions: Any = None, sizes: Any = None, lengths: Any = None) -> Tensor:
        if self.max_patches is not None:
            inputs = PackedImages(inputs, positions, sizes, lengths, self.max_patches)
        if self.dtype is not None and not inputs.is_floating_point():
            inputs = _trim_padding(inputs.long()) if self.tower.config.causal else inputs.long()
        if self.dtype == "fp16" and inputs.is_floating_point():
            inputs = inputs.half()
        # bfloat16 is widened by nodes of the graph, as few runtimes have kernels for it.
        weights = {name: value.float() for name, value in self.tower.state_dict(keep_vars=True).items()}
        features = functional_call(self.tower, weights, (inputs,)) if self.dtype == "bf16" else self.tower(inputs)
        features = features if self.dtype is None else features.float()
        return nn.functional.normalize(features, dim=-1) if self.normalize else features


def _trim_padding(tokens: Tensor) -> Tensor:
    """Removes the padding that all rows share."""
    longest = (tokens.argmax(1).max() + 1).item()
    torch._check(longest >= 2)
    torch._check(longest <= tokens.shape[1])
    return tokens[:, :longest]


def _write_onnx(
    model: CLIP | VisionModel,
    tower: TowerName,
    path: Path,
    dtype: str,
    normalize: bool,
    external: bool,
    names: tuple[str, str],
    int32: bool,
) -> None:
    """Writes a file, and raises Refused if ONNX Runtime doesn't reproduce the model's embeddings."""
    encoder = _Encoder(model, tower, normalize, dtype).eval()
    inputs = _draw_inputs(encoder.tower.config, tower)
    inputs = inputs.int() if int32 and tower == "text" else inputs
    import_extra("onnxscript")  # the exporter's own error doesn't name the extra
    with torch.no_grad(), evakernels.as_torch_operators(), _silence():
        # Of three inputs: programs take a size of one for a constant.
        program = torch.export.export(encoder, (inputs[:3],), dynamic_shapes=({0: Dim("batch", min=0)},))
        onnx_program: Any = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=names[:1], output_names=names[1:], verbose=False
        )
    graph = onnx_program.model.graph
    for node in graph.all_nodes():
        node.metadata_props.clear()  # lines of this machine's files
        for value in node.outputs:
            if value.name in names and value not in graph.outputs:
                value.name += "_inside"
    onnx_program.model.metadata_props.update(
        {"evaclip.tower": tower, "evaclip.dtype": dtype, "evaclip.normalize": str(normalize)}
    )
    onnx_program.save(path, external_data=external)
    data = path.with_name(f"{path.name}.data")
    if data.exists():
        data.chmod(path.stat().st_mode)
    reference = _Encoder(model, tower, normalize).eval()
    weight = next(reference.parameters())
    if weight.dtype != torch.float32:
        reference = copy.deepcopy(reference).float()
    with torch.no_grad():
        _check(path, inputs, reference(inputs.to(weight.device)).cpu())


def _draw_inputs(config: Any, tower: TowerName) -> Tensor:
    """Four noise images of several scales, or four captions of several lengths."""
    generator = torch.Generator().manual_seed(0)
    if tower == "image":
        noise = (torch.randn(4, 3, cells, cells, generator=generator) for cells in (2, 4, 8, 16, 32))
        return torch.stack([F.interpolate(each, config.image_shape) for each in noise]).sum(0) / 5**0.5
    start, end = config.vocab_size - 2, config.vocab_size - 1
    tokens = torch.zeros(4, config.context_length, dtype=torch.int64)
    for row, words in zip(tokens, np.linspace(1, config.context_length - 2, 4).astype(int), strict=True):
        row[0], row[words + 1] = start, end
        row[1 : words + 1] = torch.randint(1, start, (words,), generator=generator)
    return tokens


def _check(path: Path, inputs: Tensor, expected: Tensor) -> None:
    """Raises Refused if ONNX Runtime's embeddings differ from those expected, of all inputs or of the first alone."""
    session = import_extra("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    # One input alone, too: a graph may be right only for the batch size of the export.
    outputs = [session.run(None, {entry.name: batch.numpy()})[0] for batch in (inputs[:1], inputs)]
    computed, numbers = torch.from_numpy(np.concatenate(outputs)), [0, *range(len(inputs))]
    cosines = F.normalize(computed, dim=1) @ F.normalize(expected, dim=1).T
    lowest = cosines[range(len(numbers)), numbers].min().item()
    length = (computed.norm(dim=1) / expected.norm(dim=1)[numbers] - 1).abs().max().item()
    # Embeddings of different inputs may have a high cosine, too.
    if not (lowest >= _LOWEST and length <= _LENGTHS and cosines.argmax(1).tolist() == numbers):
        raise Refused(
            f"{path.name!r} must compute the model's embeddings to a cosine of {_LOWEST} and a relative length of"
            f" {_LENGTHS}, each nearest to its input's, got {lowest:.7f} and {length:.7f}"
        )


@contextmanager
def _silence() -> Iterator[None]:
    """Hides what the exporter prints, logs and warns of for its developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary folder. If the block succeeds its files move next to `target`, `target` itself last."""
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        yield Path(folder)
        written = sorted(Path(folder).iterdir(), key=lambda path: path.name == target.name)
        for path in written:
            shutil.move(path, target.with_name(path.name))
        if len(written) == 1:  # The file that is replaced may have had its weights in a second one.
            target.with_name(f"{target.name}.data").unlink(missing_ok=True)
