"""Runs the ops' accuracy tests in a process of their own, on what this process can't switch to."""

import os
import subprocess
import sys
from pathlib import Path

OPS = ("contrastive", "lamb", "layer_norm", "residual_norm", "rope_attention", "swiglu", "token_dropout")
FILES = [f"test_{op}.py" for op in OPS]
CHOICE = "accurate or odd_shapes or formula or error_rule"
RUN = "import pytest, sys; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', {choice!r}, *{files!r}]))"


def run_ops(before: str = "", choice: str = CHOICE, folder: Path = Path(__file__).parent, **environment: str) -> None:
    """The chosen tests of all ops, under the `with` statement `before` if it is given, from `folder`."""
    call = RUN.format(choice=choice, files=FILES)
    code = f"import evakernels\n{before}:\n    {call}" if before else call
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
