"""Towers as programs that run without this library: of torch's own operators, or ONNX files that were run before."""

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import evakernels
from evaclip.atomic import replacing, require_space, writing
from evaclip.errors import UserError, unknown_name
from evaclip.extras import with_remedy
from evaclip.model.clip import CLIP
from evaclip.outputs import check_output
from evakernels.nn import FrozenWeight, unfreeze

if TYPE_CHECKING:
    from evaclip.portable.check import Outcome

SUFFIXES = (".pt2", ".onnx")
TowerName = Literal["image", "text"]


def export(
    model: CLIP,
    tower: TowerName,
    target: Path,
    *,
    normalize: bool = False,
    overwrite: bool = False,
    dtype: str = "fp32",
    int8: bool = False,
    external: bool = False,
) -> "list[Outcome]":
    """Writes a program from images `[B, 3, H, W]`, or token ids `[B, context_length]`, to embeddings `[B, embed_dim]`.

    B is any number. An ONNX file takes float32 or int64 and gives float32, whatever its weights are. It holds a probe,
    inputs by a seed and the embeddings that the model computes of them in float32, and gets its name only after it has
    reproduced these in ONNX Runtime at every level of optimisation, and in OpenVINO where that is installed.

    Args:
        model: in evaluation mode; a `.pt2` computes in the dtype of its parameters.
        tower: which half of the model.
        target: `.pt2` for `torch.export.load`, `.onnx` for any ONNX runtime; appears complete or not at all. Weights of
            more than 1.9 GB lie in a second file, `NAME.onnx.data`.
        normalize: whether embeddings have length 1.
        overwrite: replace `target` if it exists. What lies in a run or a checkpoint is never replaced.
        dtype: of an ONNX file's weights: fp32; fp16, computed in as well; bf16, computed in float32.
        int8: matrix products of 8-bit integers, of ONNX files with fp32 weights otherwise.
        external: the weights of an ONNX file lie in the second one in any case: ONNX Runtime then maps them into
            memory, in a fraction of the time.

    Returns:
        What each engine made of an ONNX file's probe; nothing for a `.pt2`.

    Raises:
        Refused: an engine's embeddings have a cosine of less than 0.9999 (int8: 0.99) to the model's.
        UserError: for a target that may not or can't be written, options that don't fit it, or missing packages.

    Example:
        `export(model, "image", Path("image.onnx"), dtype="fp16")`
    """
    check_target(target, overwrite, dtype, int8)
    if target.suffix == ".pt2":
        program = exported(model, tower, normalize)
        require_space(target, sum(tensor.nbytes for tensor in program.state_dict.values()))
        with writing(target), replacing(target) as temporary, temporary.open("wb") as stream:
            torch.export.save(program, stream)
        return []
    try:
        from evaclip.portable.files import Spec, write_checked
    except ModuleNotFoundError as exc:
        raise with_remedy(exc) from exc
    spec = Spec(tower, normalize=normalize, dtype=dtype, int8=int8, external=external)
    with writing(target), _together(target) as folder:
        return write_checked(model, spec, folder / target.name)


def check_target(target: Path, overwrite: bool, dtype: str = "fp32", int8: bool = False) -> None:
    """Raises UserError for a file that `export` doesn't write."""
    if target.suffix not in SUFFIXES:
        raise UserError(f"{str(target)!r} can't be written; expected {' or '.join(SUFFIXES)}")
    if target.suffix == ".pt2" and (dtype != "fp32" or int8):
        raise UserError("dtype and int8 are those of ONNX files; a .pt2 has the dtype of the model's parameters")
    for written in (target, target.with_name(f"{target.name}.data")):
        check_output(written, overwrite=overwrite)


def exported(model: CLIP, tower: TowerName, normalize: bool = False) -> ExportedProgram:
    """The program that `export` writes to a `.pt2`. The ops of evakernels are replaced by what they mean in torch's."""
    model = exportable(model, tower)
    # Of two samples: one is a size that programs take for a constant.
    if tower == "image":
        weight = model.visual.pos_embed
        example = torch.zeros(2, 3, *model.config.vision.image_shape, dtype=weight.dtype, device=weight.device)
    else:
        device = model.text.positional_embedding.device
        example = torch.zeros(2, model.config.text.context_length, dtype=torch.int64, device=device)
    encoder = _Encoder(model, tower, normalize).eval()
    with torch.no_grad(), evakernels.as_torch_operators():
        return torch.export.export(encoder, (example,), dynamic_shapes=({0: Dim("batch")},))


def exportable(model: CLIP, tower: str) -> CLIP:
    """The model, or a copy with dense weights of one whose weights are frozen.

    Raises:
        UserError: for another tower, or a model that takes images of another size than its configuration says.
    """
    if tower not in get_args(TowerName):
        raise unknown_name("tower", tower, get_args(TowerName))
    if (size := model.visual.present.image_size) != (own := model.config.vision.image_size):
        raise UserError(f"set_image_size({size}) is in force; call set_image_size({own}) before the model is exported")
    is_frozen = any(isinstance(weight, FrozenWeight) for weight in model.parameters())
    return unfreeze(copy.deepcopy(model)) if is_frozen else model


class _Encoder(nn.Module):
    def __init__(self, model: CLIP, tower: TowerName, normalize: bool) -> None:
        super().__init__()
        self.tower = model.visual if tower == "image" else model.text
        self.normalize = normalize

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.tower(inputs)
        return nn.functional.normalize(features, dim=-1) if self.normalize else features


@contextmanager
def _together(target: Path) -> Iterator[Path]:
    """A folder beside `target`, whose files get its place if the block succeeds: the file itself last."""
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        yield Path(folder)
        made = sorted(Path(folder).iterdir(), key=lambda path: path.name == target.name)
        for path in made:
            shutil.move(path, target.with_name(path.name))
        if len(made) == 1:  # The file that is replaced may have had its weights in a second one.
            target.with_name(f"{target.name}.data").unlink(missing_ok=True)
