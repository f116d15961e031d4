"""`save_file` of safetensors, for files that others are to read."""

import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors import torch as safetensors
from torch import Tensor


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes contiguous tensors into a `.safetensors` file with the mode that the umask gives a new file.

    What safetensors 0.8 writes can be read by its owner alone, whatever the umask is.

    Raises:
        SafetensorError: the file can't be written.
        OSError: the same.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    safetensors.save_file(dict(tensors), path, metadata)
    path.chmod(mode)
