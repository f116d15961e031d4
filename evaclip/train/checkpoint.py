"""Checkpoint folders: written all or nothing, checked before use, thinned out by rule."""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evaclip.errors import UserError
from evaclip.run_files import EMA_FILE, LATEST_FILE, META_FILE, MODEL_FILE, OPTIMIZER_FOLDER, STATE_FILE
from evaclip.train import tensor_files
from evaclip.weights.parts import damage, fingerprint, is_there, joined_fingerprint, part_name, parts_of

_log = logging.getLogger(__name__)

FORMAT = 4
_NAMED = 10
"""As many damaged files are named."""
_UNFINISHED = ".unfinished-"
_FOLDER = re.compile(r"step_(\d{8})")


class DamagedCheckpoint(Exception):
    """A checkpoint folder with damaged contents; the message names the damage."""


class NotWritten(Exception):
    """A checkpoint that could not be written, on a full disk for example; the message says why."""


class Lost(NotWritten):
    """The processes that write together lost each other, and need another group."""


@dataclass(frozen=True)
class Start:
    """The checkpoint folder that a run goes on from, or with `weights_only` begins with the weights of."""

    folder: Path
    weights_only: bool = False


@dataclass(frozen=True)
class Content:
    """What goes into one checkpoint.

    Attributes:
        model: the weights, under the model's own names.
        ema: the averaged weights under the same names, or None.
        moments: of the optimizer, tensors of at least one dimension.
        descriptions: JSON files next to the weights, by file name.
        state: everything else that resuming needs; tensors and plain values only.
        meta: facts for people and for choosing among checkpoints.
    """

    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    moments: Mapping[str, Tensor]
    descriptions: Mapping[str, Any]
    state: Mapping[str, Any]
    meta: Mapping[str, Any]


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def _nothing() -> None:
    pass


def save(root: Path, step: int, content: Content, group: Any = None, guard: Callable[[], None] = _nothing) -> Path:
    """Writes the folder of `step` under another name, flushes it to the disk, renames it, and points `latest` at it.

    Args:
        group: the processes that hold the tensors of `content` together, all of which call this; None if this one
            holds them whole.
        guard: raises in the main process if nothing may be written here (any more).

    Raises:
        NotWritten: in every process; what was there before is still there.
    """
    unfinished = root / f"{_UNFINISHED}{folder_name(step)}"
    final = root / folder_name(step)
    is_main = group is None or dist.get_rank(group) == 0
    try:
        # The first and the last are the main process's; the others learn whether they went well.
        _agreed(partial(_start_folder, unfinished, guard) if is_main else _nothing, group)
        written = _agreed(partial(_write_own, unfinished, content, group), group)
        _agreed(partial(_finish_folder, unfinished, step, content, written) if is_main else _nothing, group)
        _agreed(partial(_publish, unfinished, final, guard) if is_main else _nothing, group)
    except NotWritten:
        if is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return final


def _write_own(unfinished: Path, content: Content, group: Any) -> dict[str, Any]:
    """Writes the tensors that this process holds; the fingerprints of its files, which are on the disk then."""
    _write_tensors(unfinished, content, group)
    name = "*.safetensors" if group is None else part_name(dist.get_rank(group))
    paths = sorted(unfinished.rglob(name))
    for path in paths:
        _flush(path)
    return {str(path.relative_to(unfinished)): fingerprint(path) for path in paths}


def _write_tensors(unfinished: Path, content: Content, group: Any) -> None:
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    for name, tensors in {MODEL_FILE: content.model, EMA_FILE: content.ema}.items():
        if tensors is None:
            continue
        if group is None:
            tensor_files.write_whole(tensors, unfinished / name)
        else:
            tensor_files.write_parts(tensors, parts_of(unfinished / name), rank, size)
    tensor_files.write_parts(content.moments, unfinished / OPTIMIZER_FOLDER, rank, size)


def _agreed(action: Callable[[], Any], group: Any) -> list[Any]:
    """Returns the results of `action` on all ranks. If it fails on one, raises on all: no rank waits forever."""
    result: Any = None
    problem: str | None = None
    try:
        result = action()
    except Exception as exc:  # a full disk alone is an OSError, a SafetensorError or a RuntimeError, by who writes
        problem = f"{type(exc).__name__}: {exc}"
        _log.debug("a checkpoint could not be written", exc_info=exc)
    found = [(result, problem)]
    if group is not None:
        found = [(None, None)] * dist.get_world_size(group)
        try:
            dist.all_gather_object(found, (result, problem), group=group)
        except RuntimeError as exc:  # a process is gone, or took longer than the group waits; gloo then closes it
            reason = problem or str(exc).splitlines()[0]
            raise Lost(
                f"the processes lost each other, or one took longer than parallel.saving_timeout_minutes: {reason}"
            ) from exc
    if problems := [text for _, text in found if text is not None]:
        raise NotWritten(problems[0])
    return [value for value, _ in found]


def _start_folder(unfinished: Path, guard: Callable[[], None]) -> None:
    guard()
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)


def _finish_folder(unfinished: Path, step: int, content: Content, written: Sequence[Mapping[str, Any]]) -> None:
    """Writes what isn't tensors; the others' files may not be seen on this machine yet, and needn't."""
    for name, value in content.descriptions.items():
        _write_json(unfinished / name, value)
    torch.save(dict(content.state), unfinished / STATE_FILE)
    files = {name: facts for own in written for name, facts in own.items()}
    for path in unfinished.rglob("*"):
        if path.is_file() and (name := str(path.relative_to(unfinished))) not in files:
            files[name] = fingerprint(path)
    facts = {"format": FORMAT, "step": step, **content.meta, "files": dict(sorted(files.items()))}
    _write_json(unfinished / META_FILE, facts)
    for path in (*unfinished.rglob("*"), unfinished):
        if path.suffix != ".safetensors":  # which its writer has flushed
            _flush(path)


def _publish(unfinished: Path, final: Path, guard: Callable[[], None]) -> None:
    guard()
    replaced = final.parent / f"{_UNFINISHED}replaced"
    if final.exists():
        final.rename(replaced)
    unfinished.rename(final)
    _point_latest_at(final.parent, final.name)
    shutil.rmtree(replaced, ignore_errors=True)


Ask = Callable[[tuple[Path, Mapping[str, Any]]], list[list[str]]]
"""Has all processes call `damage_in_share`, and returns what each of them found."""


def damage_in_share(job: tuple[Path, Mapping[str, Any]], share: int = 0, shares: int = 1) -> list[str]:
    """Damage of the checkpoint's files that one rank checks, usually the files that it will read.

    Args:
        job: the folder, and the size and the hash of each file.
    """
    folder, files = job
    numbers = (int((re.findall(r"\d+", Path(name).name) or [place])[0]) for place, name in enumerate(files))
    own = [name for name, number in zip(files, numbers, strict=True) if number % shares == share]
    return [problem for name in own if (problem := damage(folder, name, files[name]))]


def alone(job: tuple[Path, Mapping[str, Any]]) -> list[list[str]]:
    """`Ask` for one process."""
    return [damage_in_share(job)]


def read_meta(folder: Path, ask: Ask = alone) -> dict[str, Any]:
    """The facts of a checkpoint, after a check of every file's size and SHA-256.

    Raises:
        DamagedCheckpoint: a file is missing, short or changed, or the format is unknown.
    """
    meta = _read_facts(folder)
    if problems := [problem for found in ask((folder, meta["files"])) for problem in found]:
        raise DamagedCheckpoint(" and ".join(problems[:_NAMED]))
    return meta


def check_weights(folder: Path) -> str | None:
    """Checks the weights of a checkpoint alone; returns a remark where nothing is left to check them against.

    Raises:
        DamagedCheckpoint: they are missing, short or changed.
    """
    weights = folder / MODEL_FILE
    try:
        meta = _read_facts(folder)
    except DamagedCheckpoint as exc:
        if not tensor_files.is_complete(weights) and (weights.is_file() or not is_there(weights)):
            raise DamagedCheckpoint(f"{MODEL_FILE} is missing or can't be read") from exc
        return f"whether the weights of {folder} are as they were written can't be known: {exc}"
    files = {name: facts for name, facts in meta["files"].items() if name.startswith(MODEL_FILE)}
    if facts := joined_fingerprint(weights):
        files[MODEL_FILE] = facts
    if problems := damage_in_share((folder, files)):
        raise DamagedCheckpoint(" and ".join(problems[:_NAMED]))
    return None


def _read_facts(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    except OSError as exc:
        raise DamagedCheckpoint(f"{META_FILE} cannot be read ({exc.strerror})") from exc
    except ValueError as exc:
        raise DamagedCheckpoint(f"{META_FILE} is not JSON") from exc
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DamagedCheckpoint(f"its format is not {FORMAT}, the one this version reads")
    return meta


def load_state(folder: Path) -> dict[str, Any]:
    """What `Content.state` held, with tensors on the CPU; no code of the file is run."""
    state: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    return state


def choose(
    root: Path,
    say: Callable[[str], None],
    accept: Callable[[dict[str, Any]], bool] = lambda meta: True,
    ask: Ask = alone,
) -> Path | None:
    """The newest checkpoint under `root` that is whole and accepted; says which damaged ones it passed over.

    Checkpoints of later steps than the one that `latest` names are not newer: the run went back before them.
    """
    for folder, found in _checked(root, ask):
        if isinstance(found, DamagedCheckpoint):
            say(f"skipped the checkpoint {folder}: {found}")
        elif accept(found):
            return folder
    return None


def _checked(root: Path, ask: Ask) -> Iterator[tuple[Path, dict[str, Any] | DamagedCheckpoint]]:
    """The checkpoints up to the latest, newest first, with their facts or their damage."""
    for _, folder in sorted(_steps(root), reverse=True):
        if folder.name <= _latest_name(root, default=folder.name):
            try:
                yield folder, read_meta(folder, ask)
            except DamagedCheckpoint as exc:
                yield folder, exc


def find(request: str, root: Path, say: Callable[[str], None], ask: Ask = alone) -> Path | None:
    """The checkpoint that `--resume REQUEST` means.

    Args:
        request: none; auto (the newest whole one, if any); latest (the one `latest` names, which must be whole); or
            the path of a checkpoint folder.

    Raises:
        UserError: it was asked for by name and does not exist or is damaged, or none of the checkpoints is whole.
    """
    if request == "none":
        return None
    if request == "auto":
        return _newest_whole(root, say, ask)
    folder = root / _latest_name(root, default="latest") if request == "latest" else Path(request)
    if not folder.is_dir():
        raise UserError(
            f"there is no checkpoint folder {str(folder)!r}; --resume takes auto, latest, none, a folder or "
            "weights:FOLDER"
        )
    try:
        read_meta(folder, ask)
    except DamagedCheckpoint as exc:
        raise UserError(f"the checkpoint {str(folder)!r} is damaged: {exc}; --resume auto takes an older one") from exc
    return folder


def _newest_whole(root: Path, say: Callable[[str], None], ask: Ask) -> Path | None:
    damage: dict[Path, DamagedCheckpoint] = {}
    for folder, found in _checked(root, ask):
        if not isinstance(found, DamagedCheckpoint):
            for damaged, reason in damage.items():
                say(f"skipped the checkpoint {damaged}: {reason}")
            return folder
        damage[folder] = found
    problems = [
        f"{folder.name}: {damage.get(folder, 'later than `latest` says')}" for _, folder in sorted(_steps(root))
    ]
    if problems:
        raise UserError(
            f"no checkpoint under {str(root)!r} can be used ({'; '.join(problems)}); {_ways_on(root, damage)}"
        )
    return None


def _ways_on(root: Path, damaged: Collection[Path]) -> str:
    """What can be done where `auto` finds no checkpoint to go on from."""
    anew = "--overwrite replaces it, --set name=NAME starts another run"
    if not damaged:
        return f"--resume {newest(root)} goes on from the last one all the same; {anew}"
    for folder in damaged:
        with suppress(DamagedCheckpoint):
            check_weights(folder)
            return f"--resume weights:{folder} --set name=NAME starts a run from these weights alone; {anew}"
    return f"their weights are damaged too; {anew}"


def newest(root: Path) -> Path | None:
    """The checkpoint of the latest step, whole or not."""
    return max(_steps(root), default=(0, None))[1]


def prune(root: Path, step: int, keep: int, keep_every: int | None) -> None:
    """Of the checkpoints up to `step`, deletes all but the newest `keep` and those at multiples of `keep_every`."""
    earlier = sorted((at, folder) for at, folder in _steps(root) if at <= step)
    for at, folder in earlier[:-keep]:
        if keep_every is None or at % keep_every:
            _delete(folder)


def go_back_to(folder: Path, keep_every: int | None = None) -> None:
    """Makes `folder` the latest checkpoint, and deletes those of later steps but multiples of `keep_every`."""
    _point_latest_at(folder.parent, folder.name)
    for step, other in list(_steps(folder.parent)):
        if other.name > folder.name and (keep_every is None or step % keep_every):
            _delete(other)


def _delete(folder: Path) -> None:
    """By another name, under which nobody joins weights meanwhile; what can't be deleted goes at the next start."""
    gone = folder.rename(folder.with_name(f"{_UNFINISHED}{time.time_ns()}-{folder.name}"))
    shutil.rmtree(gone, ignore_errors=True)


def remove_unfinished(root: Path) -> None:
    """Deletes what a process left that died while it was saving."""
    for leftover in root.glob(f"{_UNFINISHED}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _steps(root: Path) -> Iterator[tuple[int, Path]]:
    if root.is_dir():
        for folder in list(root.iterdir()):
            if (match := _FOLDER.fullmatch(folder.name)) and folder.is_dir():
                yield int(match[1]), folder


def _latest_name(root: Path, default: str) -> str:
    try:
        name = (root / LATEST_FILE).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return default
    return name if _FOLDER.fullmatch(name) else default


def _point_latest_at(root: Path, name: str) -> None:
    pointer = root / f"{_UNFINISHED}{LATEST_FILE}"
    pointer.write_text(name + "\n", encoding="utf-8")
    _flush(pointer)
    pointer.replace(root / LATEST_FILE)
    _flush(root)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
