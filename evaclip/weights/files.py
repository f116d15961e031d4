"""Weights files: find, read and write them."""

import hashlib
import json
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from safetensors.torch import load_file
from torch import Tensor, nn

from evaclip.atomic import replacing, require_space, writing
from evaclip.errors import UserError
from evaclip.runs.files import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    EMA_FILE,
    HF_TEXT_FOLDER,
    LATEST_FILE,
    META_FILE,
    MODEL_CONFIG_FILE,
    MODEL_FILE,
    PREPROCESS_FILE,
)
from evaclip.weights.hub import HUB, LOCAL, RELEASED, download, download_released, find_in_folder
from evaclip.weights.layouts import to_original, unwrapped
from evaclip.weights.shards import ensure_joined, has_weights, is_dtensor

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
AVERAGE, RAW = "moving average of the steps", "of the last step"
"""Descriptions of a run's weights in files, cards and results."""
_INDEX = ".index.json"
"""Suffix of the index of weights in several files."""


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write contiguous tensors into a `.safetensors` file with the mode that the umask gives a new file.

    safetensors 0.8 makes files readable by their owner alone, whatever the umask is.

    Raises:
        SafetensorError, OSError: the file can't be written.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    safetensors.save_file(dict(tensors), path, metadata)
    path.chmod(mode)


def find_weights(source: str | Path, model: str, *, average: bool = True) -> Path:
    """Find a weights file.

    Args:
        source: the tag of released weights, a weights file, the index of one in several parts, a checkpoint folder (or
            the pointer `checkpoints/latest` to one), a run folder (its latest checkpoint), a repository or a file of
            the Hugging Face hub (`hf-hub:OWNER/NAME[/FILE][@REVISION]`), or a folder laid out as a repository
            (`local-dir:FOLDER`). A folder with the name of a tag is `./TAG`.
        model: name of the configuration, for tags of its released weights.
        average: take the moving average of the weights from a run or checkpoint that has one. Any other source is
            taken as it is, so the file `model.safetensors` of a checkpoint always has the raw weights.

    Raises:
        UserError: for a source that is none of these.
    """
    if str(source).startswith(HUB):
        return download(str(source))
    if str(source).startswith(LOCAL):
        return find_in_folder(str(source))
    if source in RELEASED.get(model, {}):
        return download_released(model, str(source))
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path, average)
    if path.name == LATEST_FILE and path.is_file():
        return _in_folder(_pointed_at(path), average)
    if has_weights(path):
        return path
    if isinstance(source, Path) or path.suffix in _SUFFIXES or len(path.parts) > 1:
        raise UserError(f"there is no weights file or checkpoint folder {str(source)!r}")
    return download_released(model, str(source))


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file on the CPU, with this package's parameter names.

    Reads `.safetensors`, and `.pt`, `.pth`, `.bin` of `torch.save`, without running code in them, and the
    `.index.json` of weights in several files. If the format allows, the tensors are views of the mapped file: never
    overwrite that file with changed tensors by `torch.save`. All layouts of EVA-CLIP are supported: the authors',
    open_clip's, timm's, with wrappers of training programs, with a flat text tower.

    Raises:
        UserError: the file is missing, damaged or no state dict.
    """
    return to_original(read_tensors(path))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file under the names in the file, without wrappers of training programs.

    Raises:
        UserError: as `load_state_dict`.
    """
    tensors: dict[str, Tensor] = {}
    for part in weight_files(Path(path)):
        content = _content(part)
        try:
            tensors |= unwrapped(content)
        except UserError as exc:
            raise UserError(f"{str(part)!r}: {exc}") from None
    return tensors


def classifier_size(path: Path) -> int:
    """Number of classes of the classifier in an image model's weights; 0 without one.

    Raises:
        UserError: as `load_state_dict`.
    """
    head = read_tensors(path).get("head.weight")
    return 0 if head is None else len(head)


def weight_files(path: Path) -> list[Path]:
    """Files with the tensors of `path`: those of an index, or `path` itself, joined from its shards if necessary.

    Raises:
        UserError: for an index that can't be read or names missing files; as `shards.ensure_joined`.
    """
    return _parts(path) if path.name.endswith(_INDEX) else [ensure_joined(path)]


def weights_kind(weights: Path) -> str:
    """Whether a file of a checkpoint has averaged or raw weights, in words; empty for any other file."""
    return {EMA_FILE: AVERAGE, MODEL_FILE: RAW}.get(weights.name, "") if (weights.parent / META_FILE).is_file() else ""


def read_model_options(weights: Path) -> dict[str, Any]:
    """Model options in the model.json of a training next to a weights file, with `name`; empty without one.

    Raises:
        UserError: the file exists, but can't be read.
    """
    path = weights.with_name(MODEL_CONFIG_FILE)
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as exc:
        raise UserError(f"{path} must describe the model of {weights.name}, but can't be read: {exc}") from exc
    if not isinstance(options, dict) or "name" not in options:  # another program's file of that name
        return {}
    if (folder := weights.with_name(HF_TEXT_FOLDER)).is_dir():  # copies of configuration and tokenizer
        options["text"]["hf_folder"] = str(folder)
    return options


def read_checkpoint(folder: Path, average: bool) -> tuple[str, Path, dict[str, Any], Path | None]:
    """Model name, weights, options of `create_model`, and run folder of a run or checkpoint folder.

    Args:
        folder: of a run or a checkpoint.
        average: as for `find_weights`.

    Raises:
        UserError: there is no checkpoint, or it has no model.json.
    """
    weights = find_weights(folder, "", average=average)
    checkpoint = weights.parent
    options = read_model_options(weights)
    if not options:
        raise UserError(
            f"{checkpoint} must have a {MODEL_CONFIG_FILE}, naming its model; else give it as NAME:{checkpoint}"
        )
    name = str(options.pop("name"))
    if (checkpoint / PREPROCESS_FILE).is_file():
        options.pop("preprocess", None)
    run = folder if (folder / CONFIG_FILE).is_file() else checkpoint.parent.parent
    return name, weights, options, run if (run / CONFIG_FILE).is_file() else None


def save_tensors(tensors: Mapping[str, Tensor], path: Path, weights: str = "") -> None:
    """Write a `.safetensors` file, or one of `torch.save`; it appears complete or not at all.

    Args:
        tensors: by name.
        path: of the file.
        weights: description of the weights in the metadata of a `.safetensors` file.

    Raises:
        UserError: for another suffix, or if the file can't be written, on a full disk for example.
    """
    check_suffix(path)
    dense, pointers = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        tied = tensor.data_ptr() in pointers  # safetensors refuses tensors that share memory
        dense[name] = tensor.clone(memory_format=torch.contiguous_format) if tied else tensor.contiguous()
        pointers.add(tensor.data_ptr())
    require_space(path, sum(tensor.nbytes for tensor in dense.values()))
    with writing(path), replacing(path) as temporary:
        try:
            if path.suffix == ".safetensors":
                save_file(dense, temporary, {"format": "pt"} | ({"weights": weights} if weights else {}))
            else:
                torch.save(dense, temporary)
        except (SafetensorError, RuntimeError) as exc:
            raise OSError(f"{exc}".strip().splitlines()[0]) from exc


def check_suffix(path: Path) -> None:
    """Check that `save_tensors` writes files of this suffix.

    Raises:
        UserError: it doesn't.
    """
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{str(path)!r} can't be written; expected one of {', '.join(_SUFFIXES)}")


def weights_hash(model: nn.Module) -> str:
    """SHA-256 (hex) over the names, dtypes, shapes and bytes of all weights, equal on all machines.

    A sharded module has the hash of the whole one. All ranks must call: they gather one tensor at a time.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole = tensor.full_tensor() if is_dtensor(tensor) else tensor
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
        digest.update(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _content(path: Path) -> Mapping[str, Any]:
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{str(path)!r} isn't a weights file; expected one of {', '.join((*_SUFFIXES, _INDEX))}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Memory mapping needs the zip format, which torch.save has written since 1.6.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise UserError(f"there is no weights file {str(path)!r}") from None
    except UnpicklingError as exc:
        raise UserError(f"{str(path)!r} is damaged, or holds other things than tensors and plain values") from exc
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as exc:
        if "TorchScript" in str(exc):
            raise UserError(
                f"{str(path)!r} is a TorchScript program, which would have to be run to be read; use the same "
                "weights as a state dict, such as hf-hub:timm/vit_base_patch16_clip_224.openai"
            ) from exc
        raise UserError(f"{str(path)!r} can't be read as weights: {exc}") from exc
    if not isinstance(content, Mapping):
        raise UserError(f"{str(path)!r} holds a {type(content).__name__}; expected tensors by name")
    return content


def _parts(index: Path) -> list[Path]:
    """Files of an index; all of them exist."""
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        parts = [index.parent / Path(name).name for name in sorted(set(files))]
    except FileNotFoundError:
        raise UserError(f"there is no weights file {str(index)!r}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise UserError(f"{str(index)!r} can't be read: expected JSON with files by tensor in weight_map") from exc
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise UserError(f"{str(index)!r} names {', '.join(missing)}, which {index.parent} doesn't have")
    return parts


def _in_folder(folder: Path, average: bool) -> Path:
    pointer = folder / CHECKPOINTS_FOLDER / LATEST_FILE
    if pointer.is_file():
        folder = _pointed_at(pointer)
    for name in (EMA_FILE, MODEL_FILE) if average else (MODEL_FILE,):
        if has_weights(folder / name):
            return folder / name
    indices = sorted(folder.glob(f"*{_INDEX}"))
    if len(indices) == 1:
        return indices[0]
    raise UserError(
        f"the folder {str(folder)!r} has no {MODEL_FILE}; expected a checkpoint such as "
        f"runs/NAME/checkpoints/step_00000100, or a run that has one; a model saved for the hub is {LOCAL}FOLDER"
    )


def _pointed_at(pointer: Path) -> Path:
    return pointer.parent / pointer.read_text(encoding="utf-8").strip()
