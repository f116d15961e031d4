"""The first hour with dirty images: check, train, be killed, resume, evaluate, take away.

Works in the present folder with the run of `evaclip train tiny`, by the installed `evaclip`. Its commands run in forks
of this process, which has imported their packages.
"""

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from multiprocessing.context import ForkProcess
from pathlib import Path

import numpy as np
from PIL import Image

import evaclip.eval.runs
import evaclip.train.trainer
from evaclip.commands.main import main as program

evaclip.create_model("tiny")
UNUSED = {"torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor"}
assert not UNUSED & set(sys.modules), "models and trainings start without these slow imports"

import torch._dynamo  # noqa: E402, F401  # every optimizer imports it

MINE, RUN = Path("mine"), Path("runs/mine")
TRAIN = ("train", "finetune", "--train-data", str(MINE), "--model", "tiny", "--pretrained", "runs/tiny")
SMALL = ("name=mine", "batch_size=8", "data.workers=0", "validation_split=0.25", "checkpoint.every_steps=2")
LONG = ("--set", *SMALL, "schedule.epochs=null", "schedule.steps=4000", "schedule.warmup_share=null")


def begin(words: tuple[str, ...], out: int) -> ForkProcess:
    """A process for a command that prints to this file."""

    def run() -> None:
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.exit(program(list(words)))

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    return process


def evaclip(*words: str, fails: int = 0) -> str:
    """The output of a command; it must end with this exit code and without a traceback."""
    with tempfile.TemporaryFile("w+") as out:
        process = begin(words, out.fileno())
        process.join()
        out.seek(0)
        printed = out.read()
    assert process.exitcode == fails, f"evaclip {' '.join(words)}: {process.exitcode}\n{printed}"
    assert "Traceback" not in printed, printed
    return printed


def expect(text: str, *parts: str) -> None:
    for part in parts:
        assert part in " ".join(text.split()), f"{part!r} is not in:\n{text}"


def draw() -> None:
    """Two classes of sixteen images in all modes, and the other files of real folders."""
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("bright", 128)):
        (MINE / name).mkdir(parents=True)
        for number in range(16):
            pixels = rng.integers(low, low + 128, (40, 40, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels)
            if number % 4 == 1:
                picture = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
            elif number % 4 == 2:
                picture = picture.quantize(16)
            picture.save(MINE / name / f"{number:02}.png")
    (MINE / ".ipynb_checkpoints").mkdir()
    shutil.copy(MINE / "dark/00.png", MINE / ".ipynb_checkpoints")
    (MINE / "empty").mkdir()
    (MINE / "dark/broken.png").write_bytes((MINE / "dark/00.png").read_bytes()[:200])


def steps_logged() -> int:
    log = RUN / "log.jsonl"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def started() -> ForkProcess:
    """A training that has made its first checkpoint."""
    words = (*TRAIN, *LONG, "log.every_steps=1", *(("--resume", "auto") if RUN.exists() else ()))
    before, end = steps_logged(), time.monotonic() + 120
    with Path(os.devnull).open("wb") as nowhere:
        process = begin(words, nowhere.fileno())
    while steps_logged() < before + 4:
        assert process.is_alive(), "the training ended by itself"
        assert time.monotonic() < end, "the training doesn't get on"
        time.sleep(0.2)
    return process


def main() -> None:
    draw()
    printed = evaclip("data", "check", str(MINE), "--workers", "0", "--json", "faults.json", fails=1)
    expect(printed, "corrupt image", "class without pictures", "16-bit")
    faults = json.dumps(json.loads(Path("faults.json").read_text()))
    assert "broken.png" in faults
    assert ".ipynb_checkpoints" not in faults

    first = started()
    try:
        expect(evaclip(*TRAIN, *LONG, "--resume", "auto", fails=2), f"process {first.pid}", "--steal")
    finally:
        first.kill()
        first.join()

    second = started()
    second.terminate()
    second.join(120)
    assert second.exitcode == 143, "a stopped training has this exit code"

    options = ("--to", "open_clip", "--model", "tiny")
    evaclip("convert", str(RUN), "mine.safetensors", *options)
    expect(evaclip("convert", str(RUN), "mine.safetensors", *options, fails=2), "exists; --force")
    printed = evaclip("eval", "zero-shot", str(RUN), "--data", str(MINE), "--workers", "0")
    expect(printed, "could not be read")


if __name__ == "__main__":
    main()
