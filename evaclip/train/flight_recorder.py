"""Last NCCL collectives of each rank, which torch's flight recorder keeps, in files for `torchfrtrace`.

RUN/flight-recorder/rank_0  rank_1 ...
"""

import os
import threading
from contextlib import suppress
from pathlib import Path
from shlex import quote

import torch

_FILE = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
_SIZE = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_ON_TIMEOUT = ("TORCH_NCCL_DUMP_ON_TIMEOUT",)
_SECONDS = 30.0
"""How long writing may take: it asks a device that may hang."""


def enable(folder: Path) -> None:
    """Sets the environment variables by which torch writes the file of this rank when a collective times out.

    Call it before process groups exist. Variables that the user has set stay.
    """
    for names, value in ((_FILE, f"{folder.absolute()}/rank_"), (_SIZE, "2000"), (_ON_TIMEOUT, "1")):
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value


def write(rank: int) -> str | None:
    """Writes the file of this rank; returns how to read it, or None if it can't be written."""
    prefix = next((os.environ[name] for name in _FILE if name in os.environ), None)
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if prefix is None or dump is None:
        return None
    path, written = Path(f"{prefix}{rank}"), list[int]()

    def work() -> None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            written.append(path.write_bytes(dump()))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    if not written:
        return None
    return (
        f"the last collectives of this rank are in {path}; `torchfrtrace {quote(str(path.parent))}` compares the ranks "
        "and names the collective that some of them didn't join"
    )
