"""Towers as programs of torch's own operators, which run without this library."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import evakernels
from evaclip.atomic import replacing, writing
from evaclip.errors import UserError
from evaclip.model.clip import CLIP
from evaclip.outputs import check_output

SUFFIXES = (".pt2", ".onnx")
_OPSET = 20


def export(
    model: CLIP,
    tower: Literal["image", "text"],
    target: Path,
    *,
    normalize: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes a program from images `[B, 3, H, W]`, or token ids `[B, context_length]`, to embeddings `[B, embed_dim]`.

    B is any number. The ops of evakernels are replaced by what they mean in torch's operators.

    Args:
        model: in evaluation mode; the program computes in the dtype of its parameters.
        tower: which half of the model.
        target: `.pt2` for `torch.export.load`, `.onnx` for any ONNX runtime; appears complete or not at all.
        normalize: whether embeddings have length 1.
        overwrite: replace `target` if it exists. What lies in a run or a checkpoint is never replaced.

    Raises:
        UserError: for a target that may not or can't be written, or where the packages that write ONNX are missing.
    """
    check_target(target, overwrite)
    program = exported(model, tower, normalize)
    with writing(target), replacing(target) as temporary:
        if target.suffix == ".pt2":
            with temporary.open("wb") as stream:
                torch.export.save(program, stream)
        else:
            _save_onnx(program, temporary)


def check_target(target: Path, overwrite: bool) -> None:
    """Raises UserError for a file that `export` doesn't write."""
    if target.suffix not in SUFFIXES:
        raise UserError(f"{str(target)!r} can't be written; expected {' or '.join(SUFFIXES)}")
    check_output(target, overwrite=overwrite)


def exported(model: CLIP, tower: Literal["image", "text"], normalize: bool = False) -> ExportedProgram:
    """The program that `export` writes."""
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


class _Encoder(nn.Module):
    def __init__(self, model: CLIP, tower: Literal["image", "text"], normalize: bool) -> None:
        super().__init__()
        self.tower = model.visual if tower == "image" else model.text
        self.normalize = normalize

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.tower(inputs)
        return nn.functional.normalize(features, dim=-1) if self.normalize else features


def _save_onnx(program: ExportedProgram, target: Path) -> None:
    try:
        onnx = torch.onnx.export(
            program, input_names=["inputs"], output_names=["embeddings"], opset_version=_OPSET, verbose=False
        )
    except ImportError as exc:
        raise UserError("writing ONNX needs onnx and onnxscript: pip install 'evakernels[export]'") from exc
    assert onnx is not None
    onnx.save(target)
