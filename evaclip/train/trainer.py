"""The training loop: fetch, step, log, evaluate, save; stop, resume and return to a checkpoint."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from statistics import median
from typing import Any

import torch

from evaclip.data import Batch
from evaclip.data.samples import BadShare
from evaclip.errors import RunFailed
from evaclip.launchers import is_launched
from evaclip.runs.files import CONFIG_FILE, STOPPED
from evaclip.runs.lock import RunLock
from evaclip.runs.log import load_yaml, read_log
from evaclip.train import checkpoint, snapshot
from evaclip.train.build import Run, build
from evaclip.train.config import TrainConfig, process_count, to_tree
from evaclip.train.distributed import (
    World,
    check_replicas,
    connect,
    interruptible,
    naming_lost_ranks,
    recording_collectives,
    write_collectives,
)
from evaclip.train.evaluation import Metrics, Stopped
from evaclip.train.optimizer import set_lr_factor, tower_rate
from evaclip.train.progress import Record, Report, Wandb, open_report, require_trackers
from evaclip.train.run_folder import RunFolder, locate, permit
from evaclip.train.saver import Saver
from evaclip.train.schedule import lr_factor
from evaclip.train.sharding import forget_gathered
from evaclip.train.snapshot import Position
from evaclip.train.step import StepResult
from evaclip.train.throughput import Meter, peak_memory
from evaclip.train.tracing import collecting, tracing
from evaclip.train.watchdog import StopSignals, Watchdog, unwinding_on_sigterm
from evaclip.weights import is_sharded

_MEDIAN_STEPS = 20
"""Median durations of a step after which a rank hangs between two steps, if more than `watchdog.seconds`."""
_VOTE_SECONDS = 1.0
"""Time of the steps between two votes of the ranks: at 1,024 ranks one takes longer than a short step."""
_MAD_SCALE = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


class TrainingDiverged(RunFailed):
    """Too many steps in a row had a loss or gradient that is not finite, or the loss jumped too often."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        steps: optimizer steps so far.
        metrics: of the last evaluation, empty without one.
        stopped_by: exit code for the signal that ended the run early, or None.
    """

    folder: Path
    steps: int
    metrics: Metrics
    stopped_by: int | None = None


def train(
    config: TrainConfig, *, resume: str = "none", overwrite: bool = False, overwrite_lock: bool = False
) -> Outcome:
    """Trains to the end, or until Ctrl-C or SIGTERM. A finished run is only reported.

    Args:
        resume: none, auto, latest, the path of a checkpoint folder or `weights:PATH`; see `run_folder.locate`.
        overwrite: delete an earlier run of the same name.
        overwrite_lock: take the lock of a process that may be gone; see `RunLock`.

    Raises:
        UserError: the configuration cannot be run, the run exists already, or another process trains it.
        TrainingDiverged: see `NonfiniteConfig`.
        RunInterrupted: another start may help: a rank was lost, a GPU or NCCL failed, or replicas differ.
        RunFailed: a device has too little memory, or more samples are bad than `data.max_bad_fraction` allows.
    """
    folder, lock = RunFolder.of(config), None
    with (
        interruptible(),
        recording_collectives(folder.collectives) if process_count() > 1 else nullcontext(),
        connect(config.device, config.parallel) as world,
        naming_lost_ranks(config.parallel, world),
        _out_of_memory_is_final(config),
        ExitStack() as stack,
    ):
        messages = list[str]()
        require_trackers(config.log)
        if world.is_main:
            stack.enter_context(unwinding_on_sigterm())
            lock = stack.enter_context(permit(config, resume, overwrite).lock(overwrite_lock))
            if lock.taken_from is not None:
                messages.append(f"took the lock of {lock.taken_from}, which ended without releasing it")
            with folder.writing():
                checkpoint.remove_unfinished(folder.checkpoints)
        folder.require_shared(world, lock)
        find = partial(locate, config, resume, overwrite, messages.append)
        start = world.decide(find, checkpoint.damage_in_share)
        run = build(config, world)
        messages += run.remarks
        position, remarks = snapshot.begin(start, run)
        messages += remarks
        metrics = world.from_main(_final_metrics(run, folder, position.step) if world.is_main else None)
        with folder.writing():
            if world.is_main and metrics is None:
                folder.create(config, overwrite)
                if world.uses_nccl:
                    folder.collectives.mkdir(exist_ok=True)  # torch makes no folder
            report = _report(run, folder if metrics is None else None, position.step)
        with report:
            for message in messages:
                report.say(message)
            if metrics is None:
                return Trainer(run, folder, report, position, lock).train()
            report.say(f"the run is finished: {_where_is(folder, position.step)}")
            return Outcome(folder.path, position.step, metrics)


@contextmanager
def _out_of_memory_is_final(config: TrainConfig) -> Iterator[None]:
    """Turns out-of-memory errors into RunFailed: another start would need as much memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as exc:
        if not isinstance(exc, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in str(exc):
            raise
        raise RunFailed(
            f"batch_size={config.batch_size} with accumulation_steps={config.accumulation_steps} must fit into memory, "
            f"got: {' '.join(str(exc).split()) or type(exc).__name__}; a larger accumulation_steps or "
            "model.savings.recompute=block takes less, and `evaclip plan` says how much"
        ) from exc


def _final_metrics(run: Run, folder: RunFolder, step: int) -> Metrics | None:
    """The last metrics of a finished run; None if something is left to do."""
    if step < run.total_steps or not folder.exists:
        return None
    if run.evaluation is None:
        return {}
    if load_yaml(folder.path / CONFIG_FILE).get("eval") != to_tree(run.config)["eval"]:
        return None  # the evaluation has changed
    evaluations = [record["eval"] for record in read_log(folder.log) if "eval" in record and record["step"] == step]
    if not evaluations:
        return None
    return {name: math.nan if value is None else value for name, value in evaluations[-1].items() if name != "seconds"}


def _where_is(folder: RunFolder, step: int) -> str:
    model = folder.checkpoints / checkpoint.folder_name(step)
    return f"the model is {model}; `evaclip report {quote(str(folder.path))}` shows the run"


def _report(run: Run, folder: RunFolder | None, start_step: int) -> Report:
    """The terminal, and with a folder all logs."""
    if not run.world.is_main:
        return Report([])
    config = run.config
    path = None if folder is None else folder.path
    report = open_report(config.log, path, start_step, run.total_steps, run.world.size)
    if path is not None and config.log.wandb is not None:
        report.add([Wandb(config.log.wandb.project, path, config.name, to_tree(config), report.say)])
    return report


class SpikeDetector:
    """Detects losses far above the median of the last ordinary ones, by robust estimates.

    Args:
        threshold_sigma: standard deviations above the median that make a loss high; None finds no spikes.
        patience: high losses in a row that make a spike.
        window: ordinary losses that are remembered; half of them are needed first.
    """

    def __init__(self, threshold_sigma: float | None, patience: int, window: int) -> None:
        self._threshold = threshold_sigma
        self._patience = patience
        self._window = window
        self._ordinary: deque[float] = deque(maxlen=window)
        self.suspicious = 0

    @property
    def is_calm(self) -> bool:
        """Whether the last loss was ordinary."""
        return self.suspicious == 0

    def state_dict(self) -> dict[str, Any]:
        """The remembered losses, as a checkpoint holds them."""
        return {"ordinary": list(self._ordinary), "suspicious": self.suspicious}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`; an empty one starts anew."""
        self._ordinary = deque(state.get("ordinary", ()), maxlen=self._window)
        self.suspicious = state.get("suspicious", 0)

    def saw(self, loss: float) -> bool:
        """Adds a loss; True if it completes a spike, which is then forgotten."""
        if self._threshold is None or not math.isfinite(loss):
            return False
        if not self._is_high(loss, self._threshold):
            self._ordinary.append(loss)
            self.suspicious = 0
            return False
        self.suspicious += 1
        if self.suspicious < self._patience:
            return False
        self.suspicious = 0
        return True

    def _is_high(self, loss: float, sigmas: float) -> bool:
        if 2 * len(self._ordinary) < self._window:
            return False
        middle = median(self._ordinary)
        deviation = _MAD_SCALE * median(abs(value - middle) for value in self._ordinary)
        return loss > middle + sigmas * deviation


class Trainer:
    """Trains a run from a position to the end."""

    def __init__(
        self, run: Run, folder: RunFolder, report: Report, position: Position, lock: RunLock | None = None
    ) -> None:
        self.run = run
        self.config = run.config
        self.world: World = run.world
        self.folder = folder
        self.report = report
        self.position = position
        self.meter = Meter(position.seconds)
        self.metrics: Metrics = {}
        self._bad_samples = 0  # of this rank, since the last log record or checkpoint
        allowed = self.config.data.max_bad_fraction
        self._bad_share = BadShare(len(run.source), allowed, position.samples, position.bad_samples)
        self._saved_at: int | None = None
        writers = self.world if is_sharded(run.model) else None
        spikes = self.config.spikes
        self._spikes = SpikeDetector(spikes.threshold_sigma, spikes.patience, spikes.window)
        self._spikes.load_state_dict(position.spikes)
        watch = self.config.watchdog
        record = partial(write_collectives, self.world.rank) if self.world.uses_nccl else None
        self._watchdog = Watchdog(self.world.rank, watch.seconds, watch.abort is True, record)
        self._may_abort = watch.abort is None and is_launched()
        self._is_steady = False  # whether all ranks go from one step to the next
        self._step_seconds: deque[float] = deque(maxlen=50)  # of the first step, and the means between log records
        self._votes: Callable[[], list[int]] | None = None
        self._voted = (position.step, time.monotonic())
        self._next_vote = 0
        self._lock = lock
        self._saver = Saver(folder.checkpoints, self.config.checkpoint, writers, report.say, self.world.device)
        run.step.before_update = self._saver.hold_updates
        self._saved_time = time.monotonic()

    def train(self) -> Outcome:
        with closing(self._watchdog), StopSignals() as signals, self._saver:
            stopped = False
            with collecting(self.config.gc_every_steps) as collect, self._tracing() as trace:

                def end_step() -> None:
                    collect(self.position.step)
                    trace()

                while not stopped and self.position.step < self.run.total_steps:
                    stopped = self._phase(signals, end_step)
            self._is_steady = False
            with self._saving():
                if self._saved_at != self.position.step:
                    self._save()
                self._saver.finish()
                if self._saver.lost():
                    self._save()  # in a new group; nothing follows that could make up for this one
                    self._saver.finish()
                # torchrun kills ranks that still write once one has ended.
                self.world.any(False)
            stopped = stopped or self._evaluate(signals)
        if stopped:
            self.report.say(f"{STOPPED}; --resume auto goes on from step {self.position.step}")
            return Outcome(self.folder.path, self.position.step, self.metrics, signals.exit_code)
        self.report.say(f"done: {_where_is(self.folder, self.position.step)}")
        return Outcome(self.folder.path, self.position.step, self.metrics)

    def _tracing(self) -> AbstractContextManager[Callable[[], object]]:
        file = self.folder.path / "traces" / f"rank_{self.world.rank}.json"
        say = self.report.say if self.world.is_main else partial(print, flush=True)
        return tracing(file, self.config.log.profile_steps, self.position.step, say)

    def _phase(self, signals: StopSignals, end_step: Callable[[], None]) -> bool:
        """The next steps with one image size; True if a signal stopped them."""
        self._is_steady = False  # the first step may open a cold index, and compiles
        self.run.set_image_size(self.position.step)
        # A log record measures steps of one image size.
        self.meter.restart()
        with closing(self.run.loader.batches(self.position.samples)) as batches:
            return self._loop(batches, signals, end_step)

    def _loop(self, batches: Iterator[Batch], signals: StopSignals, end_step: Callable[[], None]) -> bool:
        """Steps until the end or another image size; True if a signal stopped them."""
        size_at = self.run.image_size
        size = size_at(self.position.step)
        while self.position.step < self.run.total_steps and size_at(self.position.step) == size:
            before = self.position.samples
            with self._stepping("data"):
                batch = self.meter.fetch(batches)
            with self._stepping("step"):
                began = time.monotonic()
                result = self._step(batch)
                reached = self.position.step
                stop, time_is_up = self._vote(signals)
            if not self._step_seconds:
                self._step_seconds.append(time.monotonic() - began)
            self._is_steady = True
            end_step()
            if result.updates is not None:
                with self._stepping("log"):  # waits for the device
                    self._log(result)
            if stop or self.position.step == self.run.total_steps:
                return stop
            saving, evaluation = self.config.checkpoint, self.config.eval
            if time_is_up or self._is_due(saving.every_steps) or self._epochs_ended(before, saving.every_epochs):
                self._save()
            is_due = self._is_due(evaluation.every_steps) or self._epochs_ended(before, evaluation.every_epochs)
            # After a return to a checkpoint, its step has been evaluated already.
            if is_due and self.position.step == reached and self._evaluate(signals):
                return True
        return False

    def _vote(self, signals: StopSignals) -> tuple[bool, bool]:
        """Whether any rank wants to stop, and whether one wants a checkpoint; equal on all ranks.

        Between two steps the ranks vote about once in `_VOTE_SECONDS`, and a vote is read when the next one begins, so
        that no rank waits for another. Each vote has the time of a step, so that all agree on the next one.
        """
        step, before = self.position.step, self._votes
        overlaps = self.world.size > 1 and self._is_steady and step < self.run.total_steps
        if overlaps and step < self._next_vote:
            return False, False
        now = time.monotonic()
        seconds = (now - self._voted[1]) / max(1, step - self._voted[0])
        self._voted = step, now
        self._votes = self.world.begin_count(
            signals.received is not None, self._time_is_up(), max(1, round(1e6 * seconds))
        )
        stop, time_is_up, microseconds = (before if before and overlaps else self._votes)()
        self._next_vote = step + max(1, round(_VOTE_SECONDS * 1e6 * self.world.size / microseconds))
        return stop > 0, time_is_up > 0

    def _stepping(self, name: str) -> AbstractContextManager[None]:
        """A phase that ends the rank after some steps' time if it follows a step.

        Remote shards may be waited for, by one rank for a shard and by the others for that rank.
        """
        limit = self.config.watchdog.seconds
        if limit is not None and self._is_steady:
            patience = self.config.data.remote.patience if self.run.loader.remote else 0.0
            limit = max(limit, patience + _MEDIAN_STEPS * median(self._step_seconds))
        return self._watchdog.phase(name, limit=limit, abort=self._may_abort and self._is_steady)

    def _saving(self) -> AbstractContextManager[None]:
        limit = 60 * self.config.parallel.saving_timeout_minutes
        return self._watchdog.phase("saving", limit=limit, abort=self._may_abort)

    def _check_lock(self) -> None:
        if self._lock is not None:
            self._lock.check()

    def _check_replicas(self) -> None:
        average = self.run.ema.state_dict().values() if self.run.ema else ()
        check_replicas([*self.run.model.parameters(), *average], self.world)

    def _step(self, batch: Batch) -> StepResult:
        position, run, log_every = self.position, self.run, self.config.log.every_steps
        after = position.step + 1
        set_lr_factor(run.step.optimizer, self._lr_factor(), position.step)
        is_logged = after % log_every == 0 or after == run.total_steps
        result = run.step(batch, position.step, measure=is_logged)
        position.step = after
        position.samples = batch.position
        self._bad_samples += batch.skipped
        self.meter.count(self.config.batch_size, run.task.tokens_computed(batch))
        if run.ema:
            run.ema.update(position.step)
        return result

    def _log(self, result: StepResult) -> None:
        self._check_lock()
        self._check_replicas()
        step = self.run.step
        measured = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "loss_scale": step.loss_scale.scale,
            "skipped": step.skipped,
            "skipped_in_a_row": step.skipped_in_a_row,
            **result.named(),
        }
        # One copy to the host, which waits for the device.
        numbers = torch.stack([value.detach().double() for value in measured.values()]).tolist()
        values = dict(zip(measured, numbers, strict=True))
        loss, in_a_row = values.pop("loss"), values.pop("skipped_in_a_row")
        rates = {f"lr_{tower}": tower_rate(step.optimizer, tower) for tower in self.run.task.towers}
        interval = self.meter.read()
        tokens = self._count(interval.tokens)
        samples_per_second = interval.samples / interval.seconds
        self._step_seconds.append(self.config.batch_size / samples_per_second)
        self.report.record(
            Record(
                step=self.position.step,
                samples=self.position.samples,
                epoch=self.position.samples / self.run.epoch_samples,
                loss=loss,
                lr=self.config.optim.lr * self._lr_factor(self.position.step - 1),
                grad_norm=values.pop("grad_norm"),
                loss_scale=values.pop("loss_scale"),
                skipped=int(values.pop("skipped")),
                bad_samples=self.position.bad_samples,
                samples_per_second=samples_per_second,
                tokens_per_second=tokens / interval.seconds,
                data_wait=interval.waited / interval.seconds,
                mfu=self.run.mfu(samples_per_second, self.position.step - 1),
                memory_gib=peak_memory(self.world.device) / 2**30,
                seconds=self.meter.seconds,
                more={**values, **rates},
            )
        )
        self._check_bad_share()
        if in_a_row >= self.config.nonfinite.max_skipped:
            problem = f"the loss or a gradient was not finite in {int(in_a_row)} steps in a row"
            if self.config.nonfinite.action == "stop":
                problem = f"{problem}, up to step {self.position.step}"
                raise TrainingDiverged(f"{problem}; nonfinite.action=rollback would return to the last good checkpoint")
            self._go_back(problem)
        elif self._spikes.saw(loss):
            self._go_back(f"the loss was {loss:.4g}, far above the losses before")

    def _count(self, tokens: int = 0) -> float:
        """Adds up the bad samples of all ranks; returns the tokens of all ranks."""
        all_tokens, bad_samples = self.world.sum(tokens, self._bad_samples)
        self.position.bad_samples += int(bad_samples)
        self._bad_samples = 0
        return all_tokens

    def _check_bad_share(self) -> None:
        """Raises RunFailed on all ranks if too many samples of all ranks are bad."""
        if excess := self._bad_share.excess(self.position.samples, self.position.bad_samples):
            bad, read = excess
            raise RunFailed(
                f"bad samples must be at most data.max_bad_fraction={self.config.data.max_bad_fraction:.3g} of all, "
                f"got {bad:,} of {read:,} from {self.run.source.description}; `evaclip data check` lists them;"
                " --resume auto --set data.max_bad_fraction=1 trains on the rest all the same"
            )

    def _go_back(self, problem: str) -> None:
        policy = self.config.nonfinite
        problem = f"{problem}, up to step {self.position.step}"
        if self.position.rollbacks >= policy.max_rollbacks:
            raise TrainingDiverged(f"{problem}, after {policy.max_rollbacks} returns to a checkpoint already")
        self._is_steady = False
        with self._saving():
            self._saver.finish()
        with self._watchdog.phase("rollback"):
            root = self.folder.checkpoints
            choose = partial(checkpoint.choose, root, self.report.say, snapshot.is_good)
            good = self.world.decide(choose, checkpoint.damage_in_share)
            if good is None:
                raise TrainingDiverged(f"{problem}, and there is no good checkpoint to return to")
            restored, _ = snapshot.restore(good, self.run)
        # The data position stays: the same data would lead to the same failure.
        self.position.step = restored.step
        self.position.rollbacks += 1
        # Compared with later losses, the losses of the restored weights would be a spike again.
        self._spikes.load_state_dict(restored.spikes)
        if self.world.is_main:
            checkpoint.go_back_to(good, self.config.checkpoint.keep_every)
        self._saved_at = None
        self.report.say(f"{problem}: went back to {good.name}, leaving out the data in between")

    def _evaluate(self, signals: StopSignals) -> bool:
        """True if a signal stopped it. A failed evaluation costs one line, and the training goes on."""
        evaluation, ema = self.run.evaluation, self.run.ema
        if evaluation is None:
            return False
        self._is_steady = False
        begun = time.monotonic()
        whole = self.run.final_image_size()
        self._saver.hold_updates()  # the average is swapped with the model's weights
        try:
            with self._watchdog.phase("evaluation"), whole, ema.applied() if ema else nullcontext():
                self.metrics, problems = evaluation(self.run.model, lambda: signals.received is not None)
        except Stopped:
            return True
        finally:
            forget_gathered(self.run.model)
            self.meter.restart()
        for problem in problems:
            self.report.say(problem)
        self.report.evaluation(self.position.step, {**self.metrics, "seconds": time.monotonic() - begun})
        return False

    def _save(self) -> None:
        self._check_lock()
        self._is_steady = False
        self._check_replicas()
        self._count()
        self.position.seconds = self.meter.seconds
        self.position.spikes = self._spikes.state_dict()
        with self._saving():
            content = snapshot.take(self.run, self.position, calm=self._spikes.is_calm)
            if content is not None:
                self._saver.start(self.position.step, content)
        self._saved_at = self.position.step
        self._saved_time = time.monotonic()
        self.meter.restart()

    def _lr_factor(self, step: int | None = None) -> float:
        step = self.position.step if step is None else step
        return lr_factor(step, self.run.total_steps, self.config.schedule)

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.position.step % every == 0

    def _time_is_up(self) -> bool:
        minutes = self.config.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self._saved_time >= 60 * minutes

    def _epochs_ended(self, before: int, every: int | None) -> bool:
        """Whether that many epochs ended in the step that began at sample `before`."""
        if every is None:
            return False
        size = every * self.run.epoch_samples
        return before // size != self.position.samples // size
