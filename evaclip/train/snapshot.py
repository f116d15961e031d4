"""The state of a run as a checkpoint holds it: take it, and restore it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from evaclip.errors import UserError
from evaclip.runs.files import EMA_FILE, MODEL_FILE, OPTIMIZER_FOLDER
from evaclip.train import checkpoint, rng
from evaclip.train.build import Run
from evaclip.train.config import ScheduleConfig, training_tree
from evaclip.train.ema import Ema
from evaclip.train.optimizer import TimmOptimizer
from evaclip.train.schedule import image_size_at, lr_factor, total_steps
from evaclip.train.sharding import forget_gathered
from evaclip.train.tree import differences
from evaclip.weights import is_sharded, load_weights, put
from evaclip.weights.shards import has_weights, read, read_metadata, shards_folder

_SHAPING = ("model.name", "model.options", "task.", "loss.name", "optim.name")
"""Keys on which names and shapes of tensors depend."""
_LONGEST = 200
_ABOUT_FILE = {"transformers_version", "name_or_path", "_name_or_path", "is_local", "local_files_only"}
"""Keys of transformers' files that don't change a model or tokenizer."""


@dataclass
class Position:
    """Progress of a run.

    Attributes:
        step: optimizer steps so far.
        samples: position in the stream of training samples, over all ranks.
        bad_samples: replaced samples of all ranks, up to the last record or checkpoint.
        seconds: duration of the run, with earlier starts.
        rollbacks: returns to an earlier checkpoint in this start.
        spikes: state of the `SpikeDetector`.
    """

    step: int = 0
    samples: int = 0
    bad_samples: int = 0
    seconds: float = 0.0
    rollbacks: int = 0
    spikes: dict[str, Any] = field(default_factory=dict)


def take(run: Run, position: Position, *, calm: bool) -> checkpoint.Content | None:
    """The checkpoint of this moment, on the ranks that write it; every rank must call it.

    Args:
        calm: the loss shows no spike.
    """
    own = rng.capture(run.world.device)
    sharded = is_sharded(run.model)
    states = {run.world.rank: own} if sharded else dict(enumerate(run.world.gather(own)))
    if not (run.world.is_main or sharded):
        return None
    step = run.step
    tensors, scalars = take_moments(run.model, step.optimizer)
    state = {
        "step": position.step,
        "samples": position.samples,
        "bad_samples": position.bad_samples,
        "seconds": position.seconds,
        "spikes": position.spikes,
        "train_step": step.state_dict(),
        "moments": scalars,
        "ranks": run.world.size,
        "fingerprint": run.source.fingerprint,
        "taught_by": run.task.teacher_identity(),
        "config": training_tree(run.config),
    }
    return checkpoint.Content(
        model=run.model.state_dict(),
        ema=run.ema.state_dict() if run.ema else None,
        moments=tensors,
        descriptions=run.task.descriptions(run.config),
        files=run.task.files,
        random=states,
        state=state,
        meta={
            "samples": position.samples,
            "skipped_in_a_row": int(step.skipped_in_a_row),
            "calm": calm,
            "torch": torch.__version__,
        },
    )


def is_good(meta: dict[str, Any]) -> bool:
    """Whether the loss was finite and showed no spike, so that a run may return to the checkpoint."""
    return bool(meta["skipped_in_a_row"] == 0 and meta["calm"])


def begin(start: checkpoint.Start | None, run: Run) -> tuple[Position, list[str]]:
    """Restores the start of a run; returns its position and remarks. Raises as `restore`."""
    if start is None:
        return Position(), []
    if start.weights_only:
        try:
            load_weights(run.model, start.folder / MODEL_FILE)
        except UserError as exc:
            raise UserError(shorten(str(exc), 2 * _LONGEST, placeholder=" ...")) from exc
        forget_gathered(run.model)
        if run.ema:
            run.ema.restart()
        return Position(), [f"starting from the weights of {start.folder}, at step 0 with a new optimizer state"]
    position, remarks = restore(start.folder, run)
    return position, [f"resuming from {start.folder} at step {position.step}", *remarks]


def restore(folder: Path, run: Run) -> tuple[Position, list[str]]:
    """Restores weights, moments, loss scale, random states and counters.

    Returns:
        the position, and remarks on changes since the checkpoint.

    Raises:
        UserError: data, model, teacher or past steps of the schedule differ from the checkpoint's.
    """
    state = checkpoint.load_state(folder)
    before = state["config"]
    remarks = [f"changed since the checkpoint: {line}" for line in differences(before, training_tree(run.config))]
    if state["fingerprint"] != run.source.fingerprint:
        change = f"the training data ({run.source.description}) is not what the checkpoint was trained on"
        remarks.append(_accept(change, "allow_data_change", run))
    if other := differences(state["taught_by"], run.task.teacher_identity()):
        change = f"the teacher is not the one that {str(folder)!r} was trained with ({'; '.join(other)})"
        remarks.append(_accept(change, "allow_teacher_change", run))
    _require_equal_files(folder, run.task.files)
    if past := _changed_past(folder, state, run):
        remarks.append(_accept(past, "allow_schedule_change", run))
    old_optimizer, optimizer = before["optim"]["name"], run.config.optim.name
    if old_optimizer != optimizer:
        raise UserError(
            f"optim.name must be {old_optimizer} as in the checkpoint {str(folder)!r}, got {optimizer}; "
            f"--resume weights:{folder} starts with a new optimizer state"
        )
    try:
        _put_model(folder / MODEL_FILE, run.model)
        run.step.load_state_dict(state["train_step"])
        restore_moments(run.model, run.step.optimizer, folder / OPTIMIZER_FOLDER, state["moments"])
    except (UserError, RuntimeError, ValueError, KeyError) as exc:
        raise UserError(_misfit(folder, state["config"], run, exc)) from exc
    forget_gathered(run.model)
    if run.ema:
        _put_average(folder, run.ema, remarks)
    together = state.get("rng")  # of format 4
    ranks = len(together) if together else state["ranks"]
    if ranks == run.world.size:
        rank = run.world.rank
        own = together[rank] if together else checkpoint.load_state(folder, checkpoint.random_file(rank))
        rng.restore(own, run.world.device)
    else:
        remarks.append(f"{ranks} ranks wrote the checkpoint, {run.world.size} resume it: new random states")
    progress = ("step", "samples", "bad_samples", "seconds", "spikes")
    return Position(**{name: state[name] for name in progress}), remarks


def _accept(change: str, key: str, run: Run) -> str:
    """The change as a remark if `checkpoint.KEY` is true, else an error."""
    if not getattr(run.config.checkpoint, key):
        raise UserError(f"{change}; checkpoint.{key}=true goes on nevertheless")
    return change


def _require_equal_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Raises UserError, with the first differences, if `files` aren't those of the checkpoint."""
    changes = []
    for name, content in files.items():
        before = (folder / name).read_bytes() if (folder / name).is_file() else content
        if name.endswith(".json"):
            old, new = json.loads(before), json.loads(content)
            common = old.keys() & new.keys() - _ABOUT_FILE  # a later transformers has more keys
            changed = differences({key: old[key] for key in common}, {key: new[key] for key in common})
            changes += [f"{name}: {shorten(line, _LONGEST, placeholder=' ...')}" for line in changed]
        elif before != content:
            changes.append(name)
    if changes:
        raise UserError(
            f"the tokenizer and configuration of the text tower must be those of the checkpoint {str(folder)!r}, got "
            f"{'; '.join(changes[:3])}{' ...' if len(changes) > 3 else ''}"
        )


def _changed_past(folder: Path, state: dict[str, Any], run: Run) -> str | None:
    """The first past step that would have another rate or image size now."""
    try:
        before = ScheduleConfig(**state["config"]["schedule"])
    except ValidationError as exc:
        raise UserError(f"the checkpoint {str(folder)!r} must be of this version, got the schedule of another") from exc
    total = total_steps(before, state["config"]["batch_size"], len(run.source))
    if (before, total) == (run.config.schedule, run.total_steps):
        return None
    for step in range(state["step"]):
        had, has = _course(step, total, before), _course(step, run.total_steps, run.config.schedule)
        if had != has:
            return (
                f"the checkpoint {str(folder)!r} was trained by another schedule: step {step + 1} had {had}, and would "
                f"now have {has}; a schedule may change only after step {state['step']}, such as one with "
                "name=constant that gets longer or a cooldown"
            )
    return None


def _course(step: int, total: int, config: ScheduleConfig) -> str:
    rate, size = lr_factor(step, total, config), image_size_at(step, total, config)
    return f"{rate:.6g} of the peak rate" + (f" and images of {size} pixels" if size else "")


def _misfit(folder: Path, config: dict[str, Any], run: Run, exc: Exception) -> str:
    """One sentence: the changed keys on which tensors depend, or else the beginning of the error."""
    changed = [
        shorten(line, _LONGEST, placeholder=" ...")
        for line in differences(config, training_tree(run.config))
        if line.startswith(_SHAPING)
    ]
    reason = f"changed since it was written: {'; '.join(changed)}" if changed else " ".join(str(exc).split())[:_LONGEST]
    return f"the checkpoint {str(folder)!r} does not fit the model or optimizer; {reason}"


def _put_model(path: Path, model: nn.Module) -> None:
    folder = shards_folder(path)
    if not folder.is_dir():
        put(model, load_file(path))
        return
    state = model.state_dict()
    if others := read_metadata(folder).keys() - state.keys():
        raise UserError(f"the model has no {', '.join(sorted(others)[:3])}")
    read(state, folder)


def _put_average(folder: Path, ema: Ema, remarks: list[str]) -> None:
    path = folder / EMA_FILE
    if not has_weights(path):
        remarks.append("the checkpoint has no averaged weights: the average starts from its weights")
        path = folder / MODEL_FILE
    if shards_folder(path).is_dir():
        read(ema.state_dict(), shards_folder(path))
    else:
        ema.load_state_dict(load_file(path))


def take_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Any]:
    """Moments as `NAME.KIND`; and numbers and 0-D tensors, such as step counts, which are equal on all ranks."""
    values_of = optimizer.values_of if isinstance(optimizer, TimmOptimizer) else lambda p: optimizer.state.get(p, {})
    state = {
        f"{name}.{kind}": value
        for name, parameter in model.named_parameters()
        for kind, value in values_of(parameter).items()
    }
    moments = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.ndim}
    return moments, {name: value for name, value in state.items() if name not in moments}


def restore_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, scalars: Mapping[str, Any]
) -> None:
    """Restores the result of `take_moments` in its dtypes; rates and decays stay those of the present configuration.

    Parameters that aren't trained any more get no state.

    Raises:
        UserError: a moment is of a parameter that doesn't exist, or that has another shape.
    """
    parameters, is_timms = dict(model.named_parameters()), isinstance(optimizer, TimmOptimizer)
    moments: dict[str, Tensor] = {}
    for key, like in read_metadata(folder).items():
        parameter = _parameter(parameters, key)
        if parameter.shape != like.shape and not is_timms:
            raise UserError(f"the moment {key} is {list(like.shape)}, the parameter {list(parameter.shape)}")
        if parameter.requires_grad:
            same = parameter.shape == like.shape  # Adafactor has rows and columns of a matrix
            moments[key] = torch.zeros_like(parameter if same else like, dtype=like.dtype, device=parameter.device)
    read(moments, folder)
    optimizer.state.clear()
    for key, value in {**moments, **scalars}.items():
        parameter, kind = _parameter(parameters, key), key.rpartition(".")[2]
        if not parameter.requires_grad:
            continue
        if isinstance(optimizer, TimmOptimizer):
            optimizer.put_value(parameter, kind, value)
        else:
            optimizer.state[parameter][kind] = value.to(parameter.device)


def _parameter(parameters: Mapping[str, nn.Parameter], key: str) -> nn.Parameter:
    name = key.rpartition(".")[0]
    if name not in parameters:
        raise UserError(f"there is no parameter {name}")
    return parameters[name]
