"""The first hour with dirty images, by the installed `evaclip`: check, train, convert, evaluate.

Works in the present folder with the run of `evaclip train tiny`.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import evaclip.eval.runs
import evaclip.train.trainer
from evaclip.commands.main import main as program

evaclip.create_model("tiny")
UNUSED = {"torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor"}
assert not UNUSED & set(sys.modules), "models and trainings start without these slow imports"

MINE = Path("mine")


def run(*words: str, status: int = 0) -> None:
    try:
        found = program(words)
    except SystemExit as ended:
        found = ended.code
    assert found == status, words


def draw() -> None:
    """Two classes of sixteen images, with a broken image and a class without images."""
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("bright", 128)):
        (MINE / name).mkdir(parents=True)
        for number in range(16):
            pixels = rng.integers(low, low + 128, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(MINE / name / f"{number:02}.png")
    (MINE / "empty").mkdir()
    (MINE / "dark/broken.png").write_bytes((MINE / "dark/00.png").read_bytes()[:200])


draw()
run("data", "check", str(MINE), "--workers", "0", "--json", "faults.json", status=1)
assert "broken.png" in json.dumps(json.loads(Path("faults.json").read_text()))
small = ("name=mine", "batch_size=8", "data.workers=0", "validation_split=0.25", "schedule.epochs=null")
small += ("schedule.steps=4", "schedule.warmup_fraction=null")
train = ("train", "finetune", "--train-data", str(MINE), "--model", "tiny", "--pretrained", "runs/tiny")
run(*train, "--set", *small)
convert = ("convert", "runs/mine", "mine.safetensors", "--to", "open_clip", "--model", "tiny")
run(*convert)
run(*convert, status=2)  # the file exists
run("eval", "zero-shot", "runs/mine", "--data", str(MINE), "--workers", "0")
