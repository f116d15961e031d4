"""The life of an EVA in small: masked image modelling, CLIP from it, a classifier from that, and what each stage gave.

    python examples/life_cycle/life_cycle.py                        # three seeds
    python examples/life_cycle/life_cycle.py --seeds 0 --steps 100  # quicker, and says less

All stages train on Twemoji's drawings of 1,914 concepts and are measured on OpenMoji's drawings of the same concepts, a
style that no stage has seen; both come from PyPI. Every stage is a command of `evaclip`, which is printed before it
runs. A finished run isn't done again, so the script can be stopped and started anew. At the end it prints a table of
what the papers compare: mean and spread over the seeds.
"""

import argparse
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

from evaclip.commands.main import main as evaclip

BATCH, LARGE_BATCH = 128, 1024
DATA = Path("data/emoji")
SMALLEST_BLOCK = 2
# Sixteen patches: with the demo's four there is little to mask.
TOWER = {"image_size": 32, "patch_size": 8, "width": 256, "layers": 2, "heads": 4, "mlp_ratio": 2.667}


@dataclass(frozen=True)
class Life:
    """The runs of one seed."""

    folder: Path
    seed: int
    steps: int

    def train(self, name: str, recipe: str, *settings: str, steps: int | None = None) -> Path:
        """Trains a run to its end, unless that is done; returns its folder."""
        steps = steps or self.steps
        run = self.folder / f"{name}-{self.seed}"
        common = (
            f"name={run.name}",
            f"output={self.folder}",
            f"seed={self.seed}",
            f"schedule={{steps: {steps}, epochs: null, warmup_steps: {steps // 10}, warmup_fraction: null}}",
            "log={tensorboard: false, every_steps: 10}",
        )
        arguments = ["train", recipe, "--resume", "auto", "--set", *common, *settings]
        print(f"\n$ evaclip {shlex.join(arguments)}", flush=True)
        if evaclip(arguments) != 0:
            raise SystemExit(f"{run} has failed")
        return run

    def clip(self, name: str, *settings: str, steps: int | None = None) -> Path:
        """The contrastive stage: the demo's recipe with smaller patches."""
        return self.train(name, "emoji", f"model.options.vision={json.dumps(TOWER)}", *settings, steps=steps)

    def masked(self, teacher: Path) -> Path:
        """Masked image modelling on the pictures alone: features of `teacher` are predicted."""
        return self.train(
            "mim", "pretrain-mim-eva02-base", f"batch_size={BATCH}", f"data.train={DATA}/twemoji-*.tar",
            "data.workers=1", "precision=fp32", f"model.options={json.dumps(TOWER | {'attn_sub_norm': True})}",
            f"task.teacher={{name: emoji, pretrained: {teacher}, options: {{vision: {json.dumps(TOWER)}}}}}",
            f"task.smallest_block={SMALLEST_BLOCK}", "optim.lr=1.5e-3", "checkpoint.every_epochs=null",
        )  # fmt: skip

    def classifier(self, name: str, start: Path | None) -> Path:
        """Classify the concepts of the drawings with the image tower of `start`, or an untrained one."""
        weights = "null" if start is None else str(start)
        options = TOWER | {"attn_sub_norm": True, "drop_path": 0.0}
        openmoji = f"{{data: {{train: {DATA}/openmoji-*.tar}}}}"
        return self.train(
            name, "finetune-eva02-b-in1k", f"batch_size={BATCH}", f"data.train={DATA}/twemoji-*.tar", "data.workers=1",
            "precision=fp32", f"model.options={json.dumps(options)}", f"model.pretrained_image={weights}",
            f"task.classes={DATA}/classes.txt", "data.augmentation.scale=[0.6, 1.0]", "optim.lr=1e-3",
            "optim.visual.layer_decay=0.9", "ema_decay=null", f"eval={{sets: {{openmoji: {openmoji}}}}}",
        )  # fmt: skip


def rate(run: Path) -> float:
    """Samples a second of a run, the median of its records."""
    return median(record["samples_per_second"] for record in records(run) if "samples_per_second" in record)


def result(run: Path, metric: str) -> float:
    """The last value of a metric on OpenMoji, in per cent."""
    return 100 * [record["eval"] for record in records(run) if "eval" in record][-1][f"openmoji/{metric}"]


def records(run: Path) -> Iterator[dict]:
    """The log of a run."""
    yield from map(json.loads, (run / "log.jsonl").read_text().splitlines())


def live(life: Life) -> dict[str, float]:
    """All stages and comparisons of one seed: per cent by line of the table."""
    scratch = life.clip("clip")
    student = life.masked(scratch)
    from_mim = life.clip("clip-from-mim", f"model.pretrained_image={student}")
    # Both are timed by short runs of their own, one after the other, before the one gets the other's time.
    short = max(20, life.steps // 10)
    whole, half = (life.clip(f"rate-{share}", f"model.patch_dropout={share}", steps=short) for share in (0.0, 0.5))
    dropped = life.clip("clip-dropout", "model.patch_dropout=0.5", steps=round(life.steps * rate(half) / rate(whole)))
    large = [
        life.clip(
            f"clip-{name}", f"batch_size={LARGE_BATCH}", f"optim={{name: {name}, lr: {lr}, weight_decay: 0.05}}",
            steps=life.steps * BATCH // LARGE_BATCH,
        )
        for name, lr in (("adamw", 2e-3), ("lamb", 1e-2))
    ]  # fmt: skip
    starts = {"random values": None, "masked image modelling": student, "CLIP from that": from_mim}
    classifiers = {start: life.classifier(f"classifier-{i}", run) for i, (start, run) in enumerate(starts.items())}
    zero_shot = {
        "CLIP from random values": scratch,
        "CLIP from masked image modelling, equal samples": from_mim,
        "CLIP, half of the patches dropped, equal time": dropped,
        f"CLIP, AdamW, batch {LARGE_BATCH:,}": large[0],
        f"CLIP, LAMB, batch {LARGE_BATCH:,}": large[1],
    }
    found = {}
    for k in (1, 5):
        found |= {f"{line} | zero-shot top-{k}": result(run, f"zero_shot_top{k}") for line, run in zero_shot.items()}
        found |= {f"classifier from {line} | top-{k}": result(run, f"top{k}") for line, run in classifiers.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help=f"of each stage, in batches of {BATCH} (default: 300)")
    parser.add_argument("--output", type=Path, default=Path("runs/life"))
    args = parser.parse_args()
    if not (DATA / "classes.txt").exists() and evaclip(["data", "emoji", str(DATA)]) != 0:
        raise SystemExit("the drawings can't be made")
    lives = [live(Life(args.output, seed, args.steps)) for seed in args.seeds]
    print("\n| what | measured on OpenMoji | mean, % | spread |\n|---|---|---|---|")
    for line in lives[0]:
        values = [found[line] for found in lives]
        spread = f"{stdev(values):.2f}" if len(values) > 1 else "-"
        print(f"| {line} | {mean(values):.2f} | {spread} |")


if __name__ == "__main__":
    main()
