"""Compare images at their own aspect ratio with squashed images and center crops, at up to 64 patches each.

    evaclip data emoji data/emoji
    python examples/native_resolution.py data/emoji runs/native

An image is a row of one to four drawings, and its caption names them in order. A small model is trained on each kind of
image. Prints the mean, lowest and highest recall@1 on rows that aren't trained on, and the median samples per second.
"""

import argparse
import io
import json
import random
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from evaclip.data.shard_writer import write_shards

KINDS = {"native": ("data.resize=native",), "squashed": (), "crop": ()}
CONCEPTS, ROWS = 24, 12_000


def read_drawings(folder: Path) -> list[tuple[str, Image.Image]]:
    """Return names of one word, and drawings of 64 pixels on white."""
    found = {}
    for path in sorted(folder.glob("twemoji-*.tar")):
        with tarfile.open(path) as shard:
            for member in shard:
                stem = member.name.removesuffix(".txt")
                if stem != member.name and len(found) < CONCEPTS:
                    name = shard.extractfile(member).read().decode()
                    drawing = Image.open(shard.extractfile(stem + ".png")).convert("RGBA").resize((64, 64))
                    if name.isalpha():
                        white = Image.new("RGBA", drawing.size, "white")
                        found[name] = Image.alpha_composite(white, drawing).convert("RGB")
    return list(found.items())


def as_kind(row: Image.Image, kind: str) -> Image.Image:
    if kind == "squashed":
        return row.resize((128, 128))
    left = (row.width - row.height) // 2
    return row.crop((left, 0, left + row.height, row.height)) if kind == "crop" else row


def rows(drawings: list[tuple[str, Image.Image]], kind: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield samples; all kinds have the same rows."""
    generator = random.Random(0)
    seen: set[tuple[str, ...]] = set()
    while len(seen) < ROWS:
        chosen = generator.sample(drawings, generator.randint(1, 4))
        names = tuple(name for name, _ in chosen)
        if names in seen:
            continue
        seen.add(names)
        row = Image.new("RGB", (64 * len(chosen), 64))
        for place, (_, drawing) in enumerate(chosen):
            row.paste(drawing, (64 * place, 0))
        # Crops of two rows may look the same. Evaluations join images of equal bytes; the caption makes them unequal.
        caption, png, info = " ".join(names), io.BytesIO(), PngInfo()
        info.add_text("caption", caption)
        as_kind(row, kind).save(png, "PNG", pnginfo=info)
        yield f"{len(seen):06d}", {"png": png.getvalue(), "txt": caption.encode()}


def train(kind: str, seed: int, arguments: argparse.Namespace, options: tuple[str, ...]) -> tuple[float, float, float]:
    """Return recall@1 of captions by image and of images by caption, and samples per second."""
    name = f"{kind}-{arguments.steps}-{seed}"
    settings = {
        "name": name,
        "output": arguments.out,
        "seed": seed,
        "data.train": f"{arguments.out}/{kind}-*.tar",
        "data.augmentation": "{scale: [1, 1], ratio: [1, 1]}",
        "data.workers": 1,
        "batch_size": 96,
        "validation_split": 0.05,
        "eval.sets": "{held_out: {metrics: [retrieval]}}",
        "schedule.steps": arguments.steps,
        "schedule.warmup_steps": arguments.steps // 10,
        "model.options.vision": "{image_size: 128, patch_size: 16}",
    }
    given = [f"{key}={value}" for key, value in settings.items()]
    subprocess.run(["evaclip", "train", "tiny", "--resume", "auto", "--set", *given, *options], check=True)
    log = (arguments.out / name / "log.jsonl").read_text().splitlines()
    *steps, evaluation = map(json.loads, log)
    found, speed = evaluation["eval"], median(step["samples_per_second"] for step in steps)
    return found["held_out/image_to_text_r1"], found["held_out/text_to_image_r1"], speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drawings", type=Path, help="the folder that `evaclip data emoji` wrote")
    parser.add_argument("out", type=Path, help="folder for shards and runs; finished runs are kept")
    parser.add_argument("--steps", type=int, default=250, help="steps per run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per kind (default: %(default)s)")
    arguments = parser.parse_args()
    drawings = read_drawings(arguments.drawings)
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = ["| | image to text | text to image | samples/s |", "|---|---|---|---|"]
    for kind, options in KINDS.items():
        write_shards(arguments.out, kind, rows(drawings, kind), 1_000)
        results = [train(kind, seed, arguments, options) for seed in range(arguments.seeds)]
        *recalls, speeds = zip(*results, strict=True)
        cells = [f"{mean(found):.0%} ({min(found):.0%} to {max(found):.0%})" for found in recalls]
        lines.append(f"| {kind} | {' | '.join(cells)} | {mean(speeds):.0f} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
