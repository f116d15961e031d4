"""From a recipe, a YAML file and `--set a.b=c` to one checked configuration, and back to YAML."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ValidationError

from evaclip.errors import UserError, nearest
from evaclip.train.config import ADAPTER, ScheduleConfig, TrainConfig, to_tree
from evaclip.train.tree import Tree, merge, nest


def resolve(base: TrainConfig, changes: Iterable[Tree]) -> TrainConfig:
    """Applies each of `changes` to `base`, the later over the earlier.

    Raises:
        UserError: a key does not exist, or a value is not accepted.
    """
    tree = to_tree(base)
    for change in changes:
        _check_keys(TrainConfig, change, ())
        tree = merge(tree, change)
    return validate(tree)


_SPELLINGS = (("steps", "epochs"), ("warmup_steps", "warmup_share"), ("cooldown_steps", "cooldown_share"))
"""Keys of `schedule` of which one says the same as the other."""


def in_layers(layers: Iterable[Sequence[Tree]], base: TrainConfig) -> Iterator[Tree]:
    """The changes of several layers, for `resolve`: files, then flags, then `--set`.

    A layer that sets one spelling of the schedule unsets the other spelling of earlier layers. One that sets `epochs`
    also unsets the `epoch_samples` of the recipe, so that an epoch is one pass over the data given.

    Args:
        layers: the changes of each layer.
        base: the recipe that they change.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(ScheduleConfig)}
    samples = base.schedule.epoch_samples
    for changes in layers:
        schedules = [change["schedule"] for change in changes if isinstance(change.get("schedule"), Mapping)]
        given = {key: value for schedule in schedules for key, value in schedule.items()}
        pairs = [pair for one, other in _SPELLINGS for pair in ((one, other), (other, one))]
        unset = {other: defaults[other] for one, other in pairs if given.get(one) is not None and other not in given}
        if given.get("epochs") is not None and samples == base.schedule.epoch_samples:
            unset["epoch_samples"] = None
        samples = given.get("epoch_samples", unset.get("epoch_samples", samples))
        yield {"schedule": unset}
        yield from changes


def validate(tree: Mapping[str, Any]) -> TrainConfig:
    """Checks a tree of plain values.

    Raises:
        UserError: names the key, the accepted values and the given one.
    """
    _check_keys(TrainConfig, tree, ())
    try:
        return ADAPTER.validate_python(tree)
    except ValidationError as exc:
        raise UserError("; ".join(map(_describe, exc.errors()))) from exc


def load_yaml(path: str | Path) -> Tree:
    """Reads a configuration, which may hold only some of the keys."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as exc:
        raise UserError(f"cannot read the configuration {str(path)!r}: {exc.strerror}") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise UserError(f"{str(path)!r} is not YAML: {exc}") from exc
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{str(path)!r} must hold keys and values, it holds a {type(tree).__name__}")
    return tree


def dump_yaml(config: TrainConfig) -> str:
    """The complete configuration, which `load_yaml` reads back to an equal one."""
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def parse_assignment(text: str) -> Tree:
    """`a.b=value`, with the value as YAML writes it, as a nested dict."""
    path, separator, value = text.partition("=")
    if not separator or not path.strip():
        raise UserError(f"--set takes key=value, such as optim.lr=1e-3; got {text!r}")
    try:
        return nest(path.strip(), yaml.safe_load(value))
    except yaml.YAMLError as exc:
        raise UserError(f"the value in --set {text!r} is not YAML") from exc


def _check_keys(cls: type, tree: Mapping[str, Any], path: tuple[str, ...]) -> None:
    hints = get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    for key, value in tree.items():
        if key not in known:
            raise _unknown_key((*path, str(key)), known)
        for inner, part, where in _dataclasses_in(hints[key], value, (*path, key)):
            _check_keys(inner, part, where)


def _unknown_key(path: tuple[str, ...], known: list[str]) -> UserError:
    *parents, key = path
    near = nearest(key, known)
    if near:
        hint = f"did you mean {'.'.join([*parents, near[0]])!r}?"
    else:
        hint = f"{'.'.join(parents) or 'the configuration'} has: {', '.join(known)}"
    return UserError(f"unknown configuration key {'.'.join(path)!r}; {hint}")


def _dataclasses_in(hint: Any, value: Any, path: tuple[str, ...]) -> Iterator[tuple[type, Tree, tuple[str, ...]]]:
    """The dataclasses that the value, of this type, is of or has by name; with their own values and paths."""
    if not isinstance(value, Mapping):
        return
    if get_origin(hint) in (Union, UnionType):
        for each in _meant(get_args(hint), value):
            yield from _dataclasses_in(each, value, path)
    elif get_origin(hint) is dict:
        for name, part in value.items():
            yield from _dataclasses_in(get_args(hint)[1], part, (*path, str(name)))
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint, dict(value), path


def _meant(options: tuple[Any, ...], value: Mapping[str, Any]) -> Iterable[Any]:
    """Of several dataclasses the one that has the value's `name`; of a part without one, that has most of its keys."""
    classes = [option for option in options if dataclasses.is_dataclass(option)]
    if len(classes) < 2:
        return options
    fields = {option: {field.name: field.default for field in dataclasses.fields(option)} for option in classes}
    named = [option for option in classes if "name" in value and fields[option].get("name") == value["name"]]
    return named or [max(classes, key=lambda option: len(value.keys() & fields[option].keys()))]


def _describe(error: Any) -> str:
    """One pydantic error as `path=value: accepted values`."""
    parts = list(error["loc"])
    if parts[:1] == ["task"]:
        del parts[1:2]  # the kind of task, which is no key
    path = ".".join(map(str, parts))
    if error["type"] == "missing":
        return f"{path} is not set"
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    value = error["input"]
    if error["type"] == "value_error" and not isinstance(value, str | int | float):
        return f"{path}: {message}" if path else message
    return f"{path}={value!r}: {message}"
