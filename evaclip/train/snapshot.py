"""What of a run a checkpoint holds, and how it comes back."""

from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from evaclip.errors import UserError
from evaclip.run_files import EMA_FILE, MODEL_FILE, OPTIMIZER_FOLDER
from evaclip.train import checkpoint, moments, rng
from evaclip.train.build import Parts
from evaclip.train.config import TIMM, ScheduleConfig, config_hash, training_tree
from evaclip.train.ema import Ema
from evaclip.train.schedule import image_size_at, lr_factor, total_steps
from evaclip.train.sharding import forget_gathered
from evaclip.train.tree import differences
from evaclip.weights import is_sharded, load_weights, put
from evaclip.weights.parts import is_there, likes, parts_of, read

_SHAPING = ("model.name", "model.options", "task.", "loss.name", "optim.name")
"""Keys that decide what tensors there are, as far as a configuration does."""
_LONGEST = 200


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        step: optimizer steps done.
        samples: position in the stream of training samples, over all processes.
        bad_samples: those replaced, as they could not be used, over all processes, up to the last record or checkpoint.
        seconds: time that the run has taken, over all processes that went on with it.
        rollbacks: returns of this process to an earlier checkpoint.
        spikes: state of the `SpikeDetector`.
    """

    step: int = 0
    samples: int = 0
    bad_samples: int = 0
    seconds: float = 0.0
    rollbacks: int = 0
    spikes: dict[str, Any] = field(default_factory=dict)


def take(parts: Parts, position: Position, *, calm: bool) -> checkpoint.Content | None:
    """The checkpoint of this moment, in the processes that write it; every process must call it.

    `calm`: the loss shows no spike.
    """
    states = parts.world.gather(rng.capture(parts.world.device))
    if not (parts.world.is_main or is_sharded(parts.model)):
        return None
    step = parts.step
    tree = training_tree(parts.config)
    tensors, scalars = moments.take(parts.model, step.optimizer)
    state = {
        "step": position.step,
        "samples": position.samples,
        "bad_samples": position.bad_samples,
        "seconds": position.seconds,
        "spikes": position.spikes,
        "train_step": step.state_dict(),
        "moments": scalars,
        "rng": states,
        "fingerprint": parts.source.fingerprint,
        "taught_by": parts.task.teacher_identity(),  # the name in earlier checkpoints
        "config": tree,
    }
    return checkpoint.Content(
        model=parts.model.state_dict(),
        ema=parts.ema.state_dict() if parts.ema else None,
        moments=tensors,
        descriptions=parts.task.descriptions(parts.config),
        state=state,
        meta={
            "samples": position.samples,
            "skipped_in_a_row": int(step.skipped_in_a_row),
            "calm": calm,
            "config_hash": config_hash(parts.config),
            "torch": torch.__version__,
        },
    )


def is_good(meta: dict[str, Any]) -> bool:
    """Whether the checkpoint was taken while training was sound, so that going back to it helps."""
    return bool(meta["skipped_in_a_row"] == 0 and meta["calm"])


def begin(start: checkpoint.Start | None, parts: Parts) -> tuple[Position, list[str]]:
    """Puts the parts where a run starts; returns the position and lines on it. Raises as `put_back`."""
    if start is None:
        return Position(), []
    if start.weights_only:
        _put_weights(start.folder, parts)
        return Position(), [f"starting from the weights of {start.folder}, at step 0 with a new optimizer state"]
    position, remarks = put_back(start.folder, parts)
    return position, [f"resuming from {start.folder} at step {position.step}", *remarks]


def _put_weights(folder: Path, parts: Parts) -> None:
    try:
        load_weights(parts.model, folder / MODEL_FILE)
    except UserError as exc:
        raise UserError(shorten(str(exc), 2 * _LONGEST, placeholder=" ...")) from exc
    forget_gathered(parts.model)
    if parts.ema:
        parts.ema.restart()


def put_back(folder: Path, parts: Parts) -> tuple[Position, list[str]]:
    """Restores weights, moments, loss scale, random states and counters.

    Returns:
        the position, and lines on settings that changed since the checkpoint was written.

    Raises:
        UserError: the data or the model is another one, or steps that are done would have had another rate or image
            size.
    """
    state = checkpoint.load_state(folder)
    remarks = [
        f"changed since the checkpoint: {line}" for line in differences(state["config"], training_tree(parts.config))
    ]
    if state["fingerprint"] != parts.source.fingerprint:
        remarks.append(_data_changed(parts))
    if other := differences(state["taught_by"], parts.task.teacher_identity()):
        remarks.append(_teacher_changed(folder, other, parts))
    if not parts.config.checkpoint.allow_schedule_change:
        _check_schedule(folder, state, parts)
    before, optimizer = state["config"]["optim"]["name"], parts.config.optim.name
    if before != optimizer and TIMM in before + optimizer:
        raise UserError(
            f"optim.name must be {before} as in the checkpoint {str(folder)!r}, got {optimizer}; "
            f"--resume weights:{folder} starts with a new optimizer state"
        )
    try:
        _put_model(folder / MODEL_FILE, parts.model)
        parts.step.load_state_dict(state["train_step"])
        moments.put_back(parts.model, parts.step.optimizer, folder / OPTIMIZER_FOLDER, state["moments"])
    except (UserError, RuntimeError, ValueError, KeyError) as exc:
        raise UserError(_misfit(folder, state["config"], parts, exc)) from exc
    forget_gathered(parts.model)
    if parts.ema:
        _put_average(folder, parts.ema, remarks)
    if len(state["rng"]) == parts.world.size:
        rng.restore(state["rng"][parts.world.rank], parts.world.device)
    else:
        remarks.append(
            f"{len(state['rng'])} processes wrote the checkpoint, {parts.world.size} go on: new random states"
        )
    counters = {name: state[name] for name in ("step", "samples", "bad_samples", "seconds")}
    return Position(**counters, spikes=state.get("spikes", {})), remarks


def _check_schedule(folder: Path, state: dict[str, Any], parts: Parts) -> None:
    """A changed schedule may only change future steps: done steps must have the same place in both."""
    before = ScheduleConfig(**state["config"]["schedule"])
    total = total_steps(before, state["config"]["batch_size"], len(parts.source))
    if (before, total) == (parts.config.schedule, parts.total_steps):
        return
    for step in range(state["step"]):
        had, has = _course(step, total, before), _course(step, parts.total_steps, parts.config.schedule)
        if had != has:
            raise UserError(
                f"schedule must not change steps before step {state['step']} of the checkpoint {str(folder)!r}: step "
                f"{step + 1} had {had}, and would now have {has}; a constant schedule may become longer or get a "
                "cooldown; checkpoint.allow_schedule_change=true resumes nevertheless"
            )


def _course(step: int, total: int, config: ScheduleConfig) -> str:
    rate, size = lr_factor(step, total, config), image_size_at(step, total, config)
    return f"{rate:.6g} of the peak rate" + (f" and images of {size} pixels" if size else "")


def _misfit(folder: Path, config: dict[str, Any], parts: Parts, exc: Exception) -> str:
    """Why a checkpoint can't be put back, in one sentence: the keys that were changed, or else how the error begins."""
    changed = [
        shorten(line, _LONGEST, placeholder=" ...")
        for line in differences(config, training_tree(parts.config))
        if line.startswith(_SHAPING)
    ]
    reason = f"changed since it was written: {'; '.join(changed)}" if changed else " ".join(str(exc).split())[:_LONGEST]
    return f"the checkpoint {str(folder)!r} does not fit the model or optimizer; {reason}"


def _data_changed(parts: Parts) -> str:
    if not parts.config.checkpoint.allow_data_change:
        raise UserError(
            f"the training data ({parts.source.description}) is not what the checkpoint was trained on; "
            "checkpoint.allow_data_change=true goes on nevertheless, from the same position"
        )
    return "the training data has changed since the checkpoint"


def _teacher_changed(folder: Path, other: list[str], parts: Parts) -> str:
    message = f"the teacher is not the one that {str(folder)!r} was trained with ({'; '.join(other)})"
    if not parts.config.checkpoint.allow_teacher_change:
        raise UserError(f"{message}: restore task.teacher; checkpoint.allow_teacher_change=true goes on nevertheless")
    return message


def _put_model(path: Path, model: nn.Module) -> None:
    folder = parts_of(path)
    if not folder.is_dir():
        put(model, load_file(path))
        return
    state = model.state_dict()
    if others := likes(folder).keys() - state.keys():
        raise UserError(f"the model has no {', '.join(sorted(others)[:3])}")
    read(state, folder)


def _put_average(folder: Path, ema: Ema, remarks: list[str]) -> None:
    path = folder / EMA_FILE
    if not is_there(path):
        remarks.append("the checkpoint has no averaged weights: the average starts from its weights")
        path = folder / MODEL_FILE
    if parts_of(path).is_dir():
        read(ema.state_dict(), parts_of(path))
    else:
        ema.load_state_dict(load_file(path))
