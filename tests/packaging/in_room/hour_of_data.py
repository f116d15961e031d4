"""The first hour of somebody with dirty pictures of their own: check, train, be interrupted, go on, measure, take away.

Works in the present folder, where `evaclip train tiny` has left its run, with the `evaclip` that is installed; the
first thing that isn't as promised ends it. Its commands run in forks of this process, which has imported what
they need.
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
assert not UNUSED & set(sys.modules), "models and trainings begin seconds later by imports that they don't use"

import torch._dynamo  # noqa: E402, F401  # every optimizer imports it

MINE, RUN = Path("mine"), Path("runs/mine")
TRAIN = ("train", "finetune", "--train-data", str(MINE), "--model", "tiny", "--pretrained", "runs/tiny")
SMALL = ("name=mine", "batch_size=8", "data.workers=0", "held_out=0.25", "checkpoint.every_steps=2")
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
    """What a command prints; it must end with this exit code, and never with a traceback."""
    with tempfile.TemporaryFile("w+") as out:
        process = begin(words, out.fileno())
        process.join()
        out.seek(0)
        told = out.read()
    assert process.exitcode == fails, f"evaclip {' '.join(words)}: {process.exitcode}\n{told}"
    assert "Traceback" not in told, told
    return told


def expect(text: str, *parts: str) -> None:
    for part in parts:
        assert part in " ".join(text.split()), f"{part!r} is not in:\n{text}"


def draw() -> None:
    """Two classes of sixteen pictures in all modes, and what lies about in real folders."""
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
    told = evaclip("data", "check", str(MINE), "--workers", "0", "--json", "faults.json", fails=1)
    expect(told, "corrupt image", "class without pictures", "16-bit")
    faults = json.loads(Path("faults.json").read_text())
    assert "broken.png" in json.dumps(faults)
    assert ".ipynb_checkpoints" not in json.dumps(faults)

    expect(evaclip(*TRAIN, *LONG, "--dry-run"), "an estimate")

    first = started()
    try:
        expect(evaclip(*TRAIN, *LONG, "--resume", "auto", fails=2), f"process {first.pid}", "--steal")
        expect(evaclip(*TRAIN, *LONG, "--overwrite", fails=2), f"process {first.pid}")
    finally:
        first.kill()
        first.join()
    expect(evaclip("report", str(RUN), "--text"), "no sign of life")

    second = started()
    second.terminate()
    second.join(120)
    assert second.exitcode == 143, "a training that is stopped says so by its exit code"

    last = sorted((RUN / "checkpoints").glob("step_*"))[-1]
    for target, format in (("mine.safetensors", "open_clip"), ("mine.pt", "original")):
        options = ("--to", format, "--model", "tiny")
        evaclip("convert", str(RUN), target, *options)
        expect(evaclip("convert", str(RUN), target, *options, fails=2), "exists; --force")
        expect(evaclip("convert", str(RUN), str(last / "model.safetensors"), *options, "--force", fails=2), "an input")

    for folder in (RUN / "checkpoints").glob("step_*"):
        (folder / "state.pt").write_bytes(b"damaged")
    told = evaclip(*TRAIN, *LONG, "--resume", "auto", fails=2)
    expect(told, last.name, "weights:")

    told = evaclip("eval", "zero-shot", str(RUN), "--data", str(MINE), "--workers", "0")
    expect(told, "could not be read")
    for picture in list(MINE.glob("*/*.png"))[4:]:
        picture.write_bytes(picture.read_bytes()[:60])
    expect(evaclip("eval", "retrieval", str(RUN), "--data", str(MINE), "--workers", "0", fails=1), "--allow-unreadable")


if __name__ == "__main__":
    main()
