"""From a recipe, a YAML file and `--set a.b=c` to one checked configuration, and back to YAML."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from textwrap import dedent, indent, wrap
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import ValidationError

from evaclip.errors import UserError, nearest
from evaclip.train.config import ADAPTER, ALTERNATIVES, ScheduleConfig, TrainConfig, to_tree
from evaclip.train.tree import Tree, merge, nest

_WIDTH = 120
_ATTRIBUTE = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", re.MULTILINE)


def resolve(base: TrainConfig, changes: Iterable[Tree]) -> TrainConfig:
    """Applies each of `changes` to `base`, the later over the earlier.

    Raises:
        UserError: a key does not exist, or a value is not accepted.
    """
    tree = to_tree(base)
    for change in changes:
        tree = merge(tree, change)
    return validate(tree)


def in_layers(layers: Iterable[Sequence[Tree]], base: TrainConfig) -> Iterator[Tree]:
    """The changes of several layers, for `resolve`: files, then flags, then `--set`.

    A layer that sets one of two alternatives of the schedule unsets the other. One that sets `epochs` also unsets the
    `epoch_samples` of the recipe, so that an epoch is one pass over the given data.

    Args:
        layers: the changes of each layer.
        base: the recipe that they change.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(ScheduleConfig)}
    samples = base.schedule.epoch_samples
    for changes in layers:
        schedules = [change["schedule"] for change in changes if isinstance(change.get("schedule"), Mapping)]
        layer = {key: value for schedule in schedules for key, value in schedule.items()}
        pairs = [pair for one, other in ALTERNATIVES for pair in ((one, other), (other, one))]
        unset = {other: defaults[other] for one, other in pairs if layer.get(one) is not None and other not in layer}
        if layer.get("epochs") is not None and samples == base.schedule.epoch_samples:
            unset["epoch_samples"] = None
        samples = layer.get("epoch_samples", unset.get("epoch_samples", samples))
        yield {"schedule": unset}
        yield from changes


def validate(tree: Mapping[str, Any]) -> TrainConfig:
    """Checks a tree of plain values.

    Raises:
        UserError: names the key, the accepted values and the given one.
    """
    try:
        return ADAPTER.validate_python(tree)
    except ValidationError as exc:
        raise UserError("; ".join(map(_describe, exc.errors()))) from exc


def dump_yaml(config: TrainConfig) -> str:
    """The complete configuration, which `load_yaml` reads back to an equal one."""
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def commented_yaml(config: TrainConfig) -> str:
    """As `dump_yaml`, with comments from the docstrings of the dataclasses, once per class."""
    return "".join(_commented_lines(config, to_tree(config), "", set()))


def parse_assignment(text: str) -> Tree:
    """`a.b=value`, with the value as YAML writes it, as a nested dict."""
    path, separator, value = text.partition("=")
    if not separator or not path.strip():
        raise UserError(f"--set takes key=value, such as optim.lr=1e-3; got {text!r}")
    try:
        return nest(path.strip(), yaml.safe_load(value))
    except yaml.YAMLError as exc:
        raise UserError(f"the value in --set {text!r} is not YAML") from exc


def _describe(error: Any) -> str:
    """One pydantic error as `path=value: accepted values`."""
    location = list(error["loc"])
    # The kind of task is not a key.
    path = ".".join(map(str, location[:1] + location[2:] if location[:1] == ["task"] else location))
    if error["type"] == "missing":
        return f"{path} is not set"
    if error["type"] == "unexpected_keyword_argument":
        return f"unknown configuration key {path!r}; {_hint(path, _known_keys(location[:-1]))}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    value = error["input"]
    if error["type"] == "value_error" and not isinstance(value, str | int | float):
        return f"{path}: {message}" if path else message
    return f"{path}={value!r}: {message}"


def _hint(path: str, keys: list[str]) -> str:
    parent, _, key = path.rpartition(".")
    if near := nearest(key, keys):
        return f"did you mean {f'{parent}.{near[0]}'.lstrip('.')!r}?"
    return f"{parent or 'the configuration'} has: {', '.join(keys)}"


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """Keys of the dataclass at a location of a pydantic error, in which names of sets and kinds of tasks occur too."""
    classes: list[Any] = [TrainConfig]
    for key in location:
        if len(classes) > 1:
            classes = [each for each in classes if each.name == key]
        elif (hints := get_type_hints(classes[0])).keys() & {key}:
            classes = list(_dataclasses_in(hints[str(key)]))
    return [field.name for field in dataclasses.fields(classes[0])]


def _dataclasses_in(hint: Any) -> Iterator[type]:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        yield hint
    for argument in get_args(hint):
        yield from _dataclasses_in(argument)


def _commented_lines(config: Any, tree: Mapping[str, Any], margin: str, seen: set[type]) -> Iterator[str]:
    comments = {} if type(config) in seen else _field_docstrings(type(config))
    seen.add(type(config))
    width = _WIDTH - len(margin)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        nested = dataclasses.is_dataclass(value) and not isinstance(value, type)
        text = comments.get(field.name, "")
        if nested and not text and type(value) not in seen:
            text = inspect.getdoc(value) or ""
        # Only the first paragraph becomes a comment.
        for line in wrap(text.partition("\n\n")[0], width - 2):
            yield f"{margin}# {line}\n"
        if nested:
            yield f"{margin}{field.name}:\n"
            yield from _commented_lines(value, tree[field.name], margin + "  ", seen)
        else:
            yield indent(yaml.safe_dump({field.name: tree[field.name]}, sort_keys=False, width=width), margin)


def _field_docstrings(cls: type) -> dict[str, str]:
    """The docstring of each field of a dataclass: below the field, or among the class's attributes."""
    comments = {
        name: " ".join(text.split())
        for names, text in _ATTRIBUTE.findall((inspect.getdoc(cls) or "").partition("Attributes:\n")[2])
        for name in names.split(", ")
    }
    # Python keeps no docstrings of fields.
    body = ast.parse(dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, text in pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            comments[field.target.id] = inspect.cleandoc(str(ast.literal_eval(text.value)))
    return comments
