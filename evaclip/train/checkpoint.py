"""Checkpoint folders: written all or nothing, checked before use, thinned out by rule."""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evaclip.errors import UserError
from evaclip.runs.files import EMA_FILE, LATEST_FILE, META_FILE, MODEL_FILE, OPTIMIZER_FOLDER, RANDOM_FOLDER, STATE_FILE
from evaclip.weights.files import save_file
from evaclip.weights.shards import (
    DTYPES,
    INDEX,
    PLACES,
    damage,
    fingerprint,
    first_row,
    has_weights,
    is_dtensor,
    joined_fingerprint,
    shard_name,
    shards_folder,
)

_log = logging.getLogger(__name__)

FORMAT = 5
_READABLE = (4, FORMAT)
"""Format 4 has the random states of all ranks in `STATE_FILE`."""
_NAMED = 10
"""Number of damaged files that a message names."""
_UNFINISHED = ".unfinished-"
_REPLACED = f"{_UNFINISHED}replaced-"
_FOLDER = re.compile(r"step_(\d{8})")


class DamagedCheckpoint(Exception):
    """A checkpoint folder with damaged contents; the message names the damage."""


class NotWritten(Exception):
    """A checkpoint that could not be written, on a full disk for example; the message says why."""


class Lost(NotWritten):
    """The processes that write together lost each other, and need another group."""


@dataclass(frozen=True)
class Start:
    """The checkpoint from which a run resumes, or with `weights_only` takes its initial weights."""

    folder: Path
    weights_only: bool = False


@dataclass(frozen=True)
class Content:
    """The content of a checkpoint.

    Attributes:
        model: weights by name.
        ema: averaged weights by name, or None.
        moments: of the optimizer, tensors of at least one dimension.
        descriptions: JSON files next to the weights, by file name.
        state: all else that resuming needs; tensors and plain values only.
        meta: facts for people and for choosing among checkpoints.
        files: further files by path.
        random: states of random generators by rank; of the ranks that have no other writer.
    """

    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    moments: Mapping[str, Tensor]
    descriptions: Mapping[str, Any]
    state: Mapping[str, Any]
    meta: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)
    random: Mapping[int, Any] = field(default_factory=dict)


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def _nothing() -> None:
    pass


def save(root: Path, step: int, content: Content, group: Any = None) -> Path:
    """Writes the folder of `step` under another name, flushes it to the disk, renames it, and points `latest` at it.

    Args:
        group: the ranks that hold the tensors together, all of which call this; None if this rank holds them whole.

    Raises:
        NotWritten: on every rank; earlier checkpoints are unchanged.
    """
    unfinished = root / f"{_UNFINISHED}{folder_name(step)}"
    final = root / folder_name(step)
    is_main = group is None or dist.get_rank(group) == 0
    try:
        # The main rank does the first and the last two; the others learn whether they succeeded.
        _agreed(partial(_start_folder, unfinished) if is_main else _nothing, group)
        written = _agreed(partial(_write_rank_files, unfinished, content, group), group)
        _agreed(partial(_finish_folder, unfinished, step, content, written) if is_main else _nothing, group)
        _agreed(partial(_publish, unfinished, final) if is_main else _nothing, group)
    except NotWritten:
        if is_main:
            with suppress(OSError):
                remove_unfinished(root)
        raise
    return final


def _write_rank_files(unfinished: Path, content: Content, group: Any) -> dict[str, Any]:
    """Writes and flushes what this rank holds; returns the fingerprints of its files."""
    paths = _write_tensors(unfinished, content, group)
    (unfinished / RANDOM_FOLDER).mkdir(exist_ok=True)
    for rank, state in content.random.items():
        paths.append(unfinished / random_file(rank))
        torch.save(state, paths[-1])
    return _flushed(unfinished, paths)


def random_file(rank: int) -> str:
    """The file of a rank's random states in a checkpoint."""
    return f"{RANDOM_FOLDER}/{rank:05d}.pt"


def _flushed(folder: Path, paths: Iterable[Path]) -> dict[str, Any]:
    """Flushes files; returns their fingerprints by name in `folder`."""
    files = {}
    for path in paths:
        _flush(path)
        files[str(path.relative_to(folder))] = fingerprint(path)
    return files


def _write_tensors(unfinished: Path, content: Content, group: Any) -> list[Path]:
    """Writes the tensors that this rank holds; returns its files, so that no rank lists folders with files of all."""
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    paths = list[Path]()
    for name, tensors in {MODEL_FILE: content.model, EMA_FILE: content.ema}.items():
        if tensors is None:
            continue
        if group is None:
            save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, unfinished / name)
            paths.append(unfinished / name)
        else:
            paths += write_shards(tensors, shards_folder(unfinished / name), rank, size)
    return [*paths, *write_shards(content.moments, unfinished / OPTIMIZER_FOLDER, rank, size)]


def write_shards(tensors: Mapping[str, Tensor], folder: Path, rank: int, size: int) -> list[Path]:
    """Writes this rank's shards into its file in `folder`, and on rank 0 the index. All ranks call it, without talking.

    Replicas of a sharded tensor take turns in writing it; rank 0 writes tensors that aren't sharded.

    Args:
        tensors: DTensors sharded by rows, and others that are equal on all ranks.

    Returns:
        the files that this rank wrote.
    """
    shards, places, about = {}, {}, {}
    turns = 0
    for name, tensor in sorted(tensors.items()):
        first, count = 0, 1
        if is_dtensor(tensor):
            count = max(tensor.device_mesh.size(dim) for dim, how in enumerate(tensor.placements) if how.is_shard())
            first = turns % (size // count) * count
            turns += 1
        about[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "files": [first, count]}
        if first <= rank < first + count:
            shards[name] = (tensor.to_local() if is_dtensor(tensor) else tensor).detach().contiguous()
            places[name] = {"saved_offsets": [first_row(tensor), *[0] * tensor.ndim][: tensor.ndim]}
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / shard_name(rank)]
    save_file(shards, paths[0], {PLACES: json.dumps(places), "format": "pt"})
    if rank == 0:
        paths.append(folder / INDEX)
        paths[1].write_text(json.dumps({"files": size, "tensors": about}), encoding="utf-8")
    return paths


def _agreed(action: Callable[[], Any], group: Any) -> list[Any]:
    """The results of the action on all ranks; raises on all ranks if it fails on one, so that none waits for it."""
    result: Any = None
    problem: str | None = None
    try:
        result = action()
    except Exception as exc:  # a full disk alone is an OSError, a SafetensorError or a RuntimeError, by who writes
        problem = f"{type(exc).__name__}: {exc}"
        _log.debug("a checkpoint could not be written", exc_info=exc)
    results = [(result, problem)]
    if group is not None:
        results = [(None, None)] * dist.get_world_size(group)
        try:
            dist.all_gather_object(results, (result, problem), group=group)
        except RuntimeError as exc:  # a process is gone, or took longer than the group waits; gloo then closes it
            reason = problem or str(exc).splitlines()[0]
            raise Lost(
                f"the processes lost each other, or one took longer than parallel.saving_timeout_minutes: {reason}"
            ) from exc
    if problems := [text for _, text in results if text is not None]:
        raise NotWritten(problems[0])
    return [value for value, _ in results]


def _start_folder(unfinished: Path) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)


def _finish_folder(unfinished: Path, step: int, content: Content, written: Sequence[Mapping[str, Any]]) -> None:
    """Writes all but tensors; files of other machines needn't be visible here yet."""
    for name, value in content.descriptions.items():
        _write_json(unfinished / name, value)
    for name, data in content.files.items():
        (unfinished / name).parent.mkdir(exist_ok=True)
        (unfinished / name).write_bytes(data)
    torch.save(dict(content.state), unfinished / STATE_FILE)
    names = (*content.descriptions, *content.files, STATE_FILE)
    files = _flushed(unfinished, (unfinished / name for name in names))
    for each in written:
        files |= each
    facts = {"format": FORMAT, "step": step, **content.meta, "files": dict(sorted(files.items()))}
    _write_json(unfinished / META_FILE, facts)
    folders = {unfinished / folder for name in files for folder in Path(name).parents}
    for path in (unfinished / META_FILE, *folders):
        _flush(path)


def _publish(unfinished: Path, final: Path) -> None:
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    if final.exists():
        final.rename(replaced)
    unfinished.rename(final)
    _point_latest_at(final.parent, final.name)
    shutil.rmtree(replaced, ignore_errors=True)


Ask = Callable[[tuple[Path, Mapping[str, Any]]], list[list[str]]]
"""Calls `damage_in_share` on all ranks and returns all results."""


def damage_in_share(job: tuple[Path, Mapping[str, Any]], share: int = 0, shares: int = 1) -> list[str]:
    """Damage to a rank's part of the files of a checkpoint, mostly the files that it will read.

    Args:
        job: the folder, and size and hash of each file.
    """
    folder, files = job
    numbers = (int((re.findall(r"\d+", Path(name).name) or [place])[0]) for place, name in enumerate(files))
    names = [name for name, number in zip(files, numbers, strict=True) if number % shares == share]
    return [problem for name in names if (problem := damage(folder, name, files[name]))]


def alone(job: tuple[Path, Mapping[str, Any]]) -> list[list[str]]:
    """`Ask` for one rank."""
    return [damage_in_share(job)]


def read_meta(folder: Path, ask: Ask = alone) -> dict[str, Any]:
    """The facts of a checkpoint, after a check of every file's size and SHA-256.

    Raises:
        DamagedCheckpoint: a file is missing, short or changed, or the format is unknown.
    """
    meta = _read_facts(folder)
    if problems := [problem for each in ask((folder, meta["files"])) for problem in each]:
        raise DamagedCheckpoint(" and ".join(problems[:_NAMED]))
    return meta


def check_weights(folder: Path) -> str | None:
    """Checks only the weights of a checkpoint; returns a remark if their hashes are lost.

    Raises:
        DamagedCheckpoint: they are missing, short or changed.
    """
    weights = folder / MODEL_FILE
    try:
        meta = _read_facts(folder)
    except DamagedCheckpoint as exc:
        if not _is_complete(weights) and (weights.is_file() or not has_weights(weights)):
            raise DamagedCheckpoint(f"{MODEL_FILE} is missing or can't be read") from exc
        return f"the weights of {folder} can't be checked: {exc}"
    files = {name: facts for name, facts in meta["files"].items() if name.startswith(MODEL_FILE)}
    if facts := joined_fingerprint(weights):
        files[MODEL_FILE] = facts
    if problems := damage_in_share((folder, files)):
        raise DamagedCheckpoint(" and ".join(problems[:_NAMED]))
    return None


def _is_complete(path: Path) -> bool:
    """Whether a file has all the bytes that its header promises."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _read_facts(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    except OSError as exc:
        raise DamagedCheckpoint(f"{META_FILE} cannot be read ({exc.strerror})") from exc
    except ValueError as exc:
        raise DamagedCheckpoint(f"{META_FILE} is not JSON") from exc
    if not isinstance(meta, dict) or meta.get("format") not in _READABLE:
        raise DamagedCheckpoint(f"its format is none of {_READABLE}, which this version reads")
    return meta


def load_state(folder: Path, file: str = STATE_FILE) -> dict[str, Any]:
    """`Content.state`, or another file that `torch.save` wrote, with tensors on the CPU; no code in it is run."""
    state: dict[str, Any] = torch.load(folder / file, map_location="cpu", weights_only=True)
    return state


def choose(
    root: Path,
    say: Callable[[str], None],
    accept: Callable[[dict[str, Any]], bool] = lambda meta: True,
    ask: Ask = alone,
) -> Path | None:
    """The newest whole and accepted checkpoint up to the one that `latest` names; reports damaged ones.

    A run that returned to a checkpoint has later ones, which don't count.
    """
    for _, folder in sorted(_steps(root), reverse=True):
        if folder.name > _latest_name(root, default=folder.name):
            continue
        try:
            if accept(read_meta(folder, ask)):
                return folder
        except DamagedCheckpoint as exc:
            say(f"skipped the checkpoint {folder}: {exc}")
    return None


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
    problems: list[str] = []
    folder = choose(root, problems.append, ask=ask)
    if folder is not None or newest(root) is None:
        for problem in problems:
            say(problem)
        return folder
    raise UserError(f"no checkpoint under {str(root)!r} can be used: {'; '.join([*problems, _ways_on(root)])}")


def _ways_on(root: Path) -> str:
    """The commands that go on if `auto` finds no checkpoint."""
    anew = "--overwrite starts anew, --set name=NAME starts another run"
    for _, folder in sorted(_steps(root), reverse=True):
        if folder.name <= _latest_name(root, default=folder.name):
            with suppress(DamagedCheckpoint):
                check_weights(folder)
                return f"--resume weights:{folder} --set name=NAME starts a run from these weights alone; {anew}"
    last = newest(root)
    assert last is not None
    if last.name > _latest_name(root, default=last.name):
        return f"--resume {last} goes on from a checkpoint later than `latest`; {anew}"
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
    """Deletes a checkpoint under another name, where nobody joins its weights; leftovers go at the next start."""
    gone = folder.rename(folder.with_name(f"{_UNFINISHED}{time.time_ns()}-{folder.name}"))
    shutil.rmtree(gone, ignore_errors=True)


def remove_unfinished(root: Path) -> None:
    """Deletes what a process left that died while it was saving; a checkpoint that it was to replace comes back."""
    for leftover in root.glob(f"{_UNFINISHED}*"):
        replaced = leftover.with_name(leftover.name.removeprefix(_REPLACED))
        if replaced != leftover and not replaced.exists():
            leftover.rename(replaced)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
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
