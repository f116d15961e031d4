"""The first hour of somebody with dirty pictures of their own: check, train, be interrupted, go on, measure, take away.

Works in the present folder with the `evaclip` that is installed; the first thing that isn't as promised ends it.
"""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
from PIL import Image

MINE, RUN = Path("mine"), Path("runs/mine")
TRAIN = ("train", "finetune", "--train-data", str(MINE), "--model", "tiny", "--pretrained", "runs/start")
SMALL = ("name=mine", "batch_size=8", "data.workers=0", "held_out=0.25", "checkpoint.every_steps=2")
LONG = ("--set", *SMALL, "schedule.epochs=null", "schedule.steps=4000", "schedule.warmup_share=null")


def evaclip(*words: str, fails: int = 0) -> str:
    """What a command prints; it must end with this exit code, and never with a traceback."""
    done = subprocess.run(["evaclip", *words], capture_output=True, text=True)
    told = done.stdout + done.stderr
    assert done.returncode == fails, f"evaclip {' '.join(words)}: {done.returncode}\n{told}"
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


def started() -> subprocess.Popen[bytes]:
    """A training that has made its first checkpoint."""
    begin = (*TRAIN, *LONG, "log.every_steps=1", *(("--resume", "auto") if RUN.exists() else ()))
    process = subprocess.Popen(["evaclip", *begin], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before, end = steps_logged(), time.monotonic() + 120
    while steps_logged() < before + 4:
        assert process.poll() is None, "the training ended by itself"
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

    evaclip(
        "train",
        "tiny",
        "--set",
        "name=start",
        "schedule.steps=2",
        "schedule.warmup_steps=1",
        "batch_size=8",
        "eval.samples=16",
    )
    expect(evaclip(*TRAIN, *LONG, "--dry-run"), "an estimate")

    first = started()
    try:
        expect(evaclip(*TRAIN, *LONG, "--resume", "auto", fails=2), f"process {first.pid}", "--steal")
        expect(evaclip(*TRAIN, *LONG, "--overwrite", fails=2), f"process {first.pid}")
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    expect(evaclip("watch", str(RUN), "--once"), "no sign of life")

    second = started()
    second.send_signal(signal.SIGTERM)
    assert second.wait(120) == 143, "a training that is stopped says so by its exit code"

    last = sorted((RUN / "checkpoints").glob("step_*"))[-1]
    for target, format in (("mine.safetensors", "open_clip"), ("mine.pt", "original")):
        options = ("--to", format, "--model", "tiny")
        evaclip("convert", str(RUN), target, *options)
        expect(evaclip("convert", str(RUN), target, *options, fails=2), "exists; --force")
        expect(evaclip("convert", str(RUN), str(last / "model.safetensors"), *options, "--force", fails=2), "read")

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
