"""Puts faults into short trainings of two processes, and looks at what became of them.

    python tests/evaclip/train/faults/inject.py --count 200 --seed 0

Kinds and moments are drawn from the seed. After each fault the run must end with all its steps, the losses must be
those of a run that nothing happened to, every sample of the two epochs must have been trained on in its place, and
the earlier checkpoints must be whole.
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

sys.path += [str(folder) for folder in Path(__file__).parents[1:3]]

from faults import worker
from image_files import as_file
from processes import PRELOADED
from small_tasks import OPTIONS
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args
from torch.multiprocessing.spawn import ProcessContext
from trained_runs import column, evaluations

from evaclip.commands.main import main as evaclip
from evaclip.data import open_source
from evaclip.data.order import sample_order
from evaclip.data.shard_writer import write_shard
from evaclip.train import checkpoint

KINDS = (
    "kill", "SIGTERM", "SIGTERM to all, twice", "SIGTERM to the agent", "SIGTERM to the agent and all", "full disk",
    "slow disk", "unshared folder", "corrupt shard", "truncated checkpoint", "NaN batch", "NaN evaluation",
    "exception in a step", "full log", "two launches", "two launches, no flock", "kill, no flock",
)  # fmt: skip
_STRUCK = (*(kind for kind in KINDS if kind.startswith(("SIGTERM", "kill"))), "truncated checkpoint")
PROCESSES, BATCH, SAMPLES, STEPS = 2, 8, 48, 12
EVERY = 2
"""Steps from checkpoint to checkpoint."""
EVALUATE_EVERY = 3
"""Steps from evaluation to evaluation, of the runs in which one fails."""
TIMEOUT = 300
"""Seconds after which a run counts as hanging."""
_PATIENCE = 6
"""Seconds that processes wait for one with a slow disk, which takes 2 or 12."""
_SHUTDOWN = 2
"""Seconds that torchrun gives a worker when another one has ended, of the runs whose last checkpoint is slow."""
_SET = "pairs"
_MODES = ("shard", "replicate")
_STEP = 0.05
"""Seconds after the beginning of a step within which a signal strikes: one takes about that long."""


@dataclass
class Outcome:
    """What became of one fault.

    Attributes:
        problems: what should not have happened.
        starts: of torchrun.
    """

    fault: dict[str, Any]
    mode: str
    problems: list[str] = field(default_factory=list)
    starts: int = 0
    seconds: float = 0.0


def draw(rng: random.Random) -> tuple[dict[str, Any], str]:
    """A fault and the mode of the run that it strikes."""
    kind = rng.choice(KINDS)
    fault: dict[str, Any] = {"kind": kind, "rank": rng.randrange(PROCESSES)}
    if kind in _STRUCK:
        fault |= {"step": rng.randrange(STEPS - 1), "seconds": rng.uniform(0, _STEP)}
    elif kind in ("full disk", "slow disk"):
        fault |= {"save": rng.randrange(1, STEPS // EVERY + 1), "seconds": rng.choice((2, 2 * _PATIENCE))}
    elif kind == "NaN batch":
        fault["batch"] = rng.randrange(STEPS)
    elif kind == "exception in a step":
        fault["step"] = rng.randrange(STEPS)
    elif kind == "full log":
        fault |= {"rank": 0, "step": rng.randrange(STEPS - 2)}  # rank 0 writes; two steps find the disk full
    elif kind == "NaN evaluation":
        fault["evaluation"] = rng.randrange(STEPS // EVALUATE_EVERY)
    elif kind == "corrupt shard":
        fault["sample"] = rng.randrange(SAMPLES)
    mode = rng.choice(_MODES)
    if kind in ("full disk", "slow disk") and mode == "replicate":
        fault["rank"] = 0  # the one that writes
    fault["workers"] = rng.randrange(2)
    return fault, mode


def write_data(folder: Path) -> Path:
    """Three shards, whose pictures' colours are their numbers."""
    folder.mkdir(parents=True)
    for shard in range(3):
        samples = []
        for number in range(16 * shard, 16 * (shard + 1)):
            picture = as_file(Image.new("RGB", (16, 16), (number // 256, number % 256, 7)))
            samples.append((f"{number:06d}", {"png": picture, "txt": b"number %d" % number}))
        write_shard(folder / f"{shard:05d}.tar", samples)
    return folder


def start_torchrun(options, work, arguments, environment, told):
    """Starts torchrun in a fork of a process that has imported torch: each rank would take seconds to do so.

    Ranks call `work(*arguments)`; their output goes to `told`. `test_data_parallel.py` runs the command itself.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "torch.distributed.run"])
    process = context.Process(target=_run, args=(options, work, arguments, environment, told))
    process.start()
    return process


@record
def _run(options, work, arguments, environment, told):
    os.environ |= environment
    with told.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    config, _, _ = config_from_args(parse_args([*options, "program"]))
    config.start_method = "fork"
    if "SHUTDOWN" in environment:
        # From one worker's end to the kill of the others: 30 s, whatever --shutdown-timeout says.
        wait, seconds = ProcessContext._join_procs_with_timeout, float(environment["SHUTDOWN"])
        ProcessContext._join_procs_with_timeout = lambda self, _: wait(self, seconds)  # type: ignore[method-assign]
    elastic_launch(config, work)(*arguments)


class Bench:
    """Runs trainings in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_data(folder / "data")
        self._losses: list[float] = []

    def losses(self) -> list[float]:
        """Of a run that nothing happens to, in this process alone."""
        if not self._losses:
            code = evaclip(["train", *self._arguments("straight", self.data)])
            if code != 0:
                raise RuntimeError(f"evaclip train ends with {code}")
            self._losses = column(self.folder / "straight", "loss")
        return self._losses

    def strike(self, number: int, fault: dict[str, Any], mode: str) -> Outcome:
        outcome = Outcome(fault, mode)
        expected = self.losses()
        name = f"run-{number}"
        data = self.data
        if fault["kind"] == "corrupt shard":
            data = self.folder / f"{name}-data"
            shutil.copytree(self.data, data)
            _corrupt(data, fault["sample"])
        start = time.monotonic()
        run = self._train(outcome, name, data)
        outcome.seconds = time.monotonic() - start
        if not outcome.problems:
            self._look_at(outcome, run, expected)
        shutil.rmtree(run, ignore_errors=True)
        if data is not self.data:
            shutil.rmtree(data)
        return outcome

    def _train(self, outcome: Outcome, name: str, data: Path) -> Path:
        """Starts a run as often as it takes to end it."""
        run = self.folder / name
        for _ in range(3):
            outcome.starts += 1
            code, text = self._start(outcome, name, data)
            if code == 0:
                return run
            if code is None:
                outcome.problems.append(f"hangs: {text[-300:]}")
                return run
            if outcome.fault["kind"] == "truncated checkpoint" and outcome.starts == 1:
                _truncate_newest(run / "checkpoints")
        outcome.problems.append(f"doesn't end: {text[-300:]}")
        return run

    def _start(self, outcome: Outcome, name: str, data: Path) -> tuple[int | None, str]:
        # A checkpoint can be truncated only when nothing runs, so the run isn't started anew by itself.
        restarts = 0 if outcome.fault["kind"] == "truncated checkpoint" else 3
        options = [
            "--nproc-per-node", str(PROCESSES), "--max-restarts", str(restarts), "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "localhost:0",
        ]  # fmt: skip
        environment = {
            "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONWARNINGS": "ignore",
            "FAULT_FOLDER": str(self.folder / f"{name}-seen"),
        }  # fmt: skip
        (self.folder / f"{name}-seen").mkdir(exist_ok=True)
        if outcome.starts == 1:
            environment["FAULT"] = json.dumps(outcome.fault)
        arguments, told = [*self._arguments(name, data), f"parallel.mode={outcome.mode}"], self.folder / "told.txt"
        if "slow" in outcome.fault:
            environment["SHUTDOWN"] = str(_SHUTDOWN)
        if workers := outcome.fault.get("workers"):
            arguments.append(f"data.workers={workers}")
        if outcome.fault["kind"] == "slow disk":
            arguments.append(f"parallel.saving_timeout_minutes={_PATIENCE / 60}")
        if outcome.fault["kind"] == "NaN evaluation":
            one_set = f"{{data: {{train: {data}, workers: 0}}, metrics: [loss]}}"
            arguments += [f"eval.sets={{{_SET}: {one_set}}}", f"eval.every_steps={EVALUATE_EVERY}"]
        if outcome.fault["kind"].endswith("no flock"):
            environment["NO_FLOCK"] = "1"
        launches = 2 if outcome.fault["kind"].startswith("two launches") else 1
        files = [told.with_stem(f"told-{number}") for number in range(launches)]
        agents = [start_torchrun(options, worker.work, arguments, environment, file) for file in files]
        for agent in agents:
            agent.join(TIMEOUT)
        codes, texts = [agent.exitcode for agent in agents], [file.read_text() for file in files]
        told.write_text("".join(texts))
        for agent, code in zip(agents, codes, strict=True):
            if code is None:
                for child in psutil.Process(agent.pid).children(recursive=True):
                    child.kill()
                agent.kill()
                agent.join()
                return None, told.read_text()
        # Of two launches one may be refused; or it finds the run of the other finished.
        refused = ["trains the run" in text for code, text in zip(codes, texts, strict=True) if code]
        return (0 if len(refused) < launches and all(refused) else 1), told.read_text()

    def _arguments(self, name: str, data: Path) -> list[str]:
        """Of `evaclip train`; assignments may follow."""
        return [
            "tiny", "--resume", "auto", "--device", "cpu", "--set",
            f"name={name}", f"output={self.folder}", f"data={{train: {data}, workers: 0, num_samples: 1}}",
            f"batch_size={BATCH}", f"schedule={{steps: {STEPS}, name: constant, warmup_steps: 0}}", "eval.sets=null",
            "optim={name: lamb, lr: 1e-3}", "log={every_steps: 1, tensorboard: false}",
            f"checkpoint={{every_steps: {EVERY}, every_minutes: null, keep: 99}}",
            f"model.options={json.dumps(OPTIONS)}",
        ]  # fmt: skip

    def _look_at(self, outcome: Outcome, run: Path, expected: list[float]) -> None:
        kind = outcome.fault["kind"]
        losses = [math.nan if loss is None else loss for loss in column(run, "loss")]
        if len(losses) != STEPS:
            outcome.problems.append(f"{len(losses)} steps are logged")
        elif kind not in ("corrupt shard", "NaN batch"):
            off = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
            if not off < 1e-5:
                outcome.problems.append(f"the losses differ by {off:.1e}")
        elif kind == "NaN batch" and sum(map(math.isnan, losses)) != 1:
            outcome.problems.append("not one step was skipped")
        if kind == "NaN evaluation":
            expected_failures = [number == outcome.fault["evaluation"] for number in range(STEPS // EVALUATE_EVERY)]
            failed = [metrics[f"{_SET}/loss"] is None for metrics in evaluations(run).values()]
            if failed != expected_failures:
                outcome.problems.append(f"evaluations failed: {failed}, not {expected_failures}")
        for folder in sorted((run / "checkpoints").glob("step_*")):
            try:
                checkpoint.read_meta(folder)
            except checkpoint.DamagedCheckpoint as exc:
                outcome.problems.append(f"{folder.name}: {exc}")
        written = {int(folder.name.removeprefix("step_")) for folder in (run / "checkpoints").glob("step_*")}
        missing = sorted(set(range(EVERY, STEPS + 1, EVERY)) - written)
        if missing != _refused(outcome):
            outcome.problems.append(f"step_: checkpoints are missing of steps {missing}")
        outcome.problems += self._wrong_samples(run, outcome)

    def _wrong_samples(self, run: Path, outcome: Outcome) -> list[str]:
        order = sample_order(SAMPLES, 0, 100_000, open_source(str(self.data)).shard_sizes)
        problems = []
        part = BATCH // PROCESSES
        for rank in range(PROCESSES):
            lines = (run.with_name(f"{run.name}-seen") / f"samples-{rank}.jsonl").read_text().splitlines()
            # A step that was done again counts as it was done last.
            seen = {record["step"]: record["numbers"] for record in map(json.loads, lines)}
            for step in range(STEPS):
                first = step * BATCH + rank * part
                wanted = order.indices(np.arange(first, first + part)).tolist()
                # A sample that can't be read is replaced; those beside it keep their places.
                bad = outcome.fault.get("sample")
                found = seen.get(step, [])
                right = len(found) == part and all(n == w for n, w in zip(found, wanted, strict=True) if w != bad)
                if not right:
                    problems.append(f"process {rank} step {step}: samples {found}, not {wanted}")
        shutil.rmtree(run.with_name(f"{run.name}-seen"))
        return problems


def _refused(outcome: Outcome) -> list[int]:
    """The steps whose checkpoints were never there: the disk was full, or others waited too long for it."""
    fault = outcome.fault
    is_slow = fault["kind"] == "slow disk" and fault["seconds"] > _PATIENCE and outcome.mode == "shard"
    is_refused = is_slow or fault["kind"] == "full disk"
    # The last one is tried again, by the run itself or by the one that takes its place.
    return [EVERY * fault["save"]] if is_refused and EVERY * fault["save"] < STEPS else []


def _corrupt(data: Path, sample: int) -> None:
    """Overwrites the picture of a sample by noise, whose shard stays a tar."""
    path = data / f"{sample // 16:05d}.tar"
    content = bytearray(path.read_bytes())
    start = content.index(b"\x89PNG", content.index(f"{sample:06d}.png".encode()))
    content[start : start + 60] = bytes(random.Random(sample).randbytes(60))
    path.write_bytes(content)


def _truncate_newest(checkpoints: Path) -> None:
    folders = sorted(checkpoints.glob("step_*"))
    if len(folders) > 1:
        path = next(path for path in sorted(folders[-1].rglob("*.safetensors")) if path.stat().st_size > 100)
        path.write_bytes(path.read_bytes()[:-100])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=len(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder) / "bench")
        for number in range(args.count):
            outcomes.append(bench.strike(number, *draw(rng)))
            last = outcomes[-1]
            state = "; ".join(last.problems) or "fine"
            print(f"{number + 1}/{args.count} {last.fault} {last.mode} {last.seconds:.0f} s: {state}", flush=True)
    wrong = sum(bool(outcome.problems) for outcome in outcomes)
    print(f"{len(outcomes)} faults, {wrong} with problems")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
