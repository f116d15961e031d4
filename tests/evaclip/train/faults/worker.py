"""One process of a training into which a fault is put; torchrun calls `work` in place of `evaclip train`.

The fault is JSON in $FAULT. It strikes once: only processes that torchrun has not started anew, in the first start of
the run, know it. What each process trains on is written down, step by step: the pictures of these tests have one
colour, which is the sample's number.
"""

import errno
import fcntl
import json
import math
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from evaclip.commands.main import main
from evaclip.data import Batch, TrainLoader
from evaclip.model.config import Preprocess
from evaclip.train import checkpoint, run_folder, saver
from evaclip.train.evaluation import DistributedEncoder
from evaclip.train.step import TrainStep
from evaclip.train.tasks import contrastive
from evaclip.transforms import Normalization


def numbers(images: torch.Tensor) -> list[int]:
    """The samples' numbers, of pictures [n, 3, height, width], normalised or not."""
    images = Normalization(Preprocess())(images)
    mean, std = (torch.tensor(values)[None, :, None, None] for values in (Preprocess().mean, Preprocess().std))
    colours = ((images * std + mean) * 255).mean(dim=(2, 3)).nan_to_num().round().int()
    return [int(red) * 256 + int(green) for red, green, _ in colours.tolist()]


def write_down_samples() -> None:
    original = TrainStep.__call__

    def call(self: TrainStep, batch: Batch, step: int, **options: bool) -> Any:
        line = json.dumps({"step": step, "numbers": numbers(batch.images)})
        with (Path(os.environ["FAULT_FOLDER"]) / f"samples-{os.environ['RANK']}.jsonl").open("a") as file:
            file.write(line + "\n")
        return original(self, batch, step, **options)

    TrainStep.__call__ = call  # type: ignore[method-assign]


def _agent_and_all() -> list[int]:
    """Data workers too."""
    agent = psutil.Process(os.getppid())
    return [process.pid for process in (agent, *agent.children(recursive=True))]


VICTIMS = {
    "SIGTERM": lambda: [os.getpid()],
    "SIGTERM to the agent": lambda: [os.getppid()],
    "SIGTERM to the agent and all": _agent_and_all,
}
"""Process ids by the kind of fault."""


def strike_in(blow, seconds, number, times=1, victims=VICTIMS["SIGTERM"]):
    """Sends the victims a signal some time after the beginning of the step `blow`, or several, as long apart."""
    original = TrainStep.__call__

    def call(self: TrainStep, batch: Batch, step: int, **options: bool) -> Any:
        if step == blow:
            threading.Thread(target=strike, daemon=True).start()
        return original(self, batch, step, **options)

    def strike() -> None:
        for _ in range(times):
            time.sleep(seconds)
            for victim in victims():
                with suppress(ProcessLookupError):
                    os.kill(victim, number)

    TrainStep.__call__ = call  # type: ignore[method-assign]


def fill_disk(save: int) -> None:
    """No file of this process may grow beyond 64 KiB while it writes the n-th checkpoint, whoever writes it."""
    original = saver.checkpoint.save
    calls = []

    def limited(*args: Any) -> Any:
        calls.append(args)
        if len(calls) != save:
            return original(*args)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
        try:
            return original(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    saver.checkpoint.save = limited


def slow_disk(save: int, seconds: float) -> None:
    """This process takes so long to write its tensors of the n-th checkpoint."""
    original = checkpoint._write_tensors
    calls = []

    def slow(*args: Any) -> list[Path]:
        calls.append(args)
        if len(calls) == save:
            time.sleep(seconds)
        return original(*args)

    checkpoint._write_tensors = slow


def fail_in(step: int) -> None:
    """This process raises between the forward pass of a step and its update, when others wait for its gradients."""
    original = TrainStep.__call__

    def call(self: TrainStep, batch: Batch, number: int, **options: bool) -> Any:
        def raised(*_: Any) -> None:
            raise RuntimeError("a fault")

        if number == step:
            self.parameters[0].register_hook(raised)
        return original(self, batch, number, **options)

    TrainStep.__call__ = call  # type: ignore[method-assign]


def fill_log(step: int) -> None:
    """The files that this process writes line by line are on a full disk for two steps."""
    original, full, before = TrainStep.__call__, os.open("/dev/full", os.O_WRONLY), {}

    def call(self: TrainStep, batch: Batch, number: int, **options: bool) -> Any:
        if number == step:
            links = list(Path("/proc/self/fd").iterdir())
            for descriptor in [int(link.name) for link in links if os.path.realpath(link).endswith(".jsonl")]:
                before[descriptor] = os.dup(descriptor)
                os.dup2(full, descriptor)
        elif number == step + 2:
            for descriptor, saved in before.items():
                os.dup2(saved, descriptor)
        return original(self, batch, number, **options)

    TrainStep.__call__ = call  # type: ignore[method-assign]


def poison(batch: int) -> None:
    """The n-th batch of this process is not a number."""
    original: Callable[..., Iterator[Batch]] = TrainLoader.batches

    def batches(self: TrainLoader, position: int = 0) -> Iterator[Batch]:
        for index, loaded in enumerate(original(self, position)):
            if index == batch:
                images = Normalization(Preprocess())(loaded.images)
                images[0, 2] = float("nan")  # blue isn't part of the number
                loaded = replace(loaded, pieces=[images])
            yield loaded

    TrainLoader.batches = batches  # type: ignore[assignment, method-assign]


def poison_evaluation(number: int) -> None:
    """This process's pictures have no features in the n-th evaluation."""
    evaluate, encode = contrastive.measured, DistributedEncoder.encode_image
    calls = []

    def evaluated(*args: Any) -> Any:
        calls.append(args)
        return evaluate(*args)

    def encoded(*args: Any, **options: bool) -> torch.Tensor:
        features = encode(*args, **options)
        return features * math.nan if len(calls) == number + 1 else features

    contrastive.measured = evaluated
    DistributedEncoder.encode_image = encoded  # type: ignore[method-assign]


def go_elsewhere(arguments: list[str]) -> None:
    """This process has another folder under the name of the one that the runs lie in."""
    for place, argument in enumerate(arguments):
        if argument.startswith("output="):
            arguments[place] = f"{argument}/elsewhere"


def remove_flock() -> None:
    """Stands in for a file system without flock."""

    def flock(file: int, kind: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    fcntl.flock = flock


def install(fault: dict[str, Any], arguments: list[str]) -> None:
    if fault["kind"] == "unshared folder":
        run_folder.ATTRIBUTES = 1.0
    if fault["kind"] == "SIGTERM to all, twice":
        strike_in(fault["step"], fault["seconds"], signal.SIGTERM, times=2)
    if "slow" in fault and os.environ["RANK"] == "0":
        slow_disk(fault["save"], fault["slow"])
    if str(fault["rank"]) != os.environ["RANK"]:
        return
    if fault["kind"] in ("kill", "kill, no flock", "truncated checkpoint"):
        strike_in(fault["step"], fault["seconds"], signal.SIGKILL)
    elif fault["kind"] in VICTIMS:
        strike_in(fault["step"], fault["seconds"], signal.SIGTERM, victims=VICTIMS[fault["kind"]])
    elif fault["kind"] == "unshared folder":
        go_elsewhere(arguments)
    elif fault["kind"] == "slow disk":
        slow_disk(fault["save"], fault["seconds"])
    elif fault["kind"] == "full disk":
        fill_disk(fault["save"])
    elif fault["kind"] == "NaN batch":
        poison(fault["batch"])
    elif fault["kind"] == "exception in a step":
        fail_in(fault["step"])
    elif fault["kind"] == "full log":
        fill_log(fault["step"])
    elif fault["kind"] == "NaN evaluation":
        poison_evaluation(fault["evaluation"])


def work(*given: str) -> None:
    arguments = list(given)
    torch.set_num_threads(1)
    write_down_samples()
    if "NO_FLOCK" in os.environ:
        remove_flock()
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and "FAULT" in os.environ:
        install(json.loads(os.environ["FAULT"]), arguments)
    raise SystemExit(main(["train", *arguments]))
