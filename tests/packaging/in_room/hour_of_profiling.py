"""The benchmarks of a checkout on the installed wheel. Argument: the checkout. Works in the present folder."""

import json
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
sys.argv[1:] = ["--installed"]

from benchmarks.cli import main as benchmarks  # noqa: E402

FAST = ("--passes", "1", "--seconds", "0.01", "--threads", "1")
WRONG = """
from benchmarks import peer

@peer("layer_norm", "wrong")
def build(shape):
    return lambda x, weight, bias: x[:1]
"""

Path("wrong.py").write_text(WRONG)
own = ("op", "layer_norm", "--shape", "64x256", "--dtype", "float32", "--installed", *FAST)
assert benchmarks([*own, "--plugin", "wrong.py", "--peer", "wrong", "--json", "a.json"]) == 0
result = json.loads(Path("a.json").read_text())
rows = [row for row in result["rows"] if row["candidate"] == "wrong"]
assert rows
assert all(row["failure"] and not any(row["samples_ms"]) for row in rows), rows
assert "site-packages" in result["machine"]["package"]
assert benchmarks(["compare", "a.json", "--html", "a.html"]) == 0
assert Path("a.html").stat().st_size > 1000
