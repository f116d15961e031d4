"""What a process tells the agent of torchrun that started it, and will start it again when it fails."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path


def stop_restarts(mistake: str, *, at_once: bool = False) -> None:
    """Ends the agent if the previous start ended in the same mistake; without torchrun does nothing.

    A second start may find a file system that was away; a wrong key fails in every start. No exit code keeps the agent
    from a restart, so it gets a SIGTERM.

    Args:
        mistake: the message that identifies the error.
        at_once: end the agent after this start already.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/attempt_N/LOCAL_RANK/error.json
    if error_file is None:
        return
    folder = Path(error_file).parents[2]
    before = folder / f"mistake-{Path(error_file).parent.name}.txt"
    if not (at_once or (before.is_file() and before.read_text(encoding="utf-8") == mistake)):
        before.write_text(mistake, encoding="utf-8")
        return
    print("another start would fail in the same way: torchrun is told to stop", file=sys.stderr, flush=True)
    with suppress(FileExistsError):  # another rank has sent the signal, and a second one would interrupt the clean-up
        (folder / "stopped").touch(exist_ok=False)
        os.kill(os.getppid(), signal.SIGTERM)
