"""What a process tells the agent of torchrun that started it, and will start it again when it fails."""

import os
import signal
import sys
from pathlib import Path


def stop_restarts(mistake: str) -> None:
    """Ends the agent if the start before this one ended in the same mistake; else, and without torchrun, goes on.

    A second start may find a file system that was away; a wrong key it finds again, as often as `--max-restarts` says.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/attempt_N/LOCAL_RANK/error.json
    if error_file is None:
        return
    before = Path(error_file).parents[2] / f"mistake-{Path(error_file).parent.name}.txt"
    if before.is_file() and before.read_text(encoding="utf-8") == mistake:
        print("that ended the start before this one too: torchrun is told to stop", file=sys.stderr, flush=True)
        os.kill(os.getppid(), signal.SIGTERM)
    else:
        before.write_text(mistake, encoding="utf-8")
