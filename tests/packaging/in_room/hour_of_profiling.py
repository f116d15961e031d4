"""The benchmarks of a checkout on the installed wheel.

Argument: the checkout. Works in the present folder. The commands run in forks of this process, which has imported their
packages.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, sys.argv[1])
os.environ["COLUMNS"] = "250"

from benchmarks.cli import main as program

FAST = ("--passes", "1", "--seconds", "0.01", "--threads", "1")
WRONG = """
from benchmarks import peer


@peer("layer_norm", "wrong")
def build(shape):
    return lambda x, weight, bias: x[:1]
"""


def benchmarks(*words: str, fails: int = 0) -> str:
    with tempfile.TemporaryFile("w+") as out:

        def run() -> None:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            sys.exit(program(words))

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        process.join()
        out.seek(0)
        printed = out.read()
    assert process.exitcode == fails, f"benchmarks {' '.join(words)}: {process.exitcode}\n{printed}"
    assert "Traceback" not in printed, printed
    return printed


def main() -> None:
    Path("wrong.py").write_text(WRONG)
    printed = benchmarks("op", "layer_nrm", fails=2)
    assert "did you mean 'layer_norm'" in printed, printed

    own = ("op", "layer_norm", "--shape", "64x256", "--dtype", "float32", "--installed", *FAST)
    printed = benchmarks(*own, "--plugin", "wrong.py", "--peer", "wrong", "--json", "a.json")
    result = json.loads(Path("a.json").read_text())
    rows = [row for row in result["rows"] if row["candidate"] == "wrong"]
    assert rows, printed
    assert all(row["failure"] and not any(row["samples_ms"]) for row in rows), rows
    assert "site-packages" in json.dumps(result["machine"]), result["machine"]

    benchmarks("compare", "a.json", "--html", "a.html")
    assert Path("a.html").stat().st_size > 1000
    print("done")


if __name__ == "__main__":
    main()
