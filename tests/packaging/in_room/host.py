"""Runs scripts, each in a fork of this process, which has imported torch.

Reads a request a line from standard input, a script's file and its arguments as JSON; answers each with a line: the
exit code, standard output and standard error of the script.
"""

import json
import multiprocessing
import os
import runpy
import sys
import tempfile

import torch  # noqa: F401


def run(words: list[str], out: int, err: int) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        request = (json.loads(line), out.fileno(), err.fileno())
        child = multiprocessing.get_context("fork").Process(target=run, args=request)
        child.start()
        child.join()
        printed = [file.seek(0) or file.read() for file in (out, err)]
    print(json.dumps([child.exitcode, *printed]), flush=True)
