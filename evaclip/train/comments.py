"""A configuration as YAML that says what its keys mean, in the words of the dataclasses' docstrings."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from textwrap import dedent, indent, wrap
from typing import Any

import yaml

from evaclip.train.config import TrainConfig, to_tree

_WIDTH = 120
_INDENT = "  "
_ATTRIBUTE = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", re.MULTILINE)


def commented_yaml(config: TrainConfig) -> str:
    """As `dump_yaml`, with a comment above each key that has one; of a class that comes again, the first time only."""
    return "".join(_lines(config, to_tree(config), "", set()))


def _lines(config: Any, tree: Mapping[str, Any], margin: str, seen: set[type]) -> Iterator[str]:
    comments = {} if type(config) in seen else _comments(type(config))
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
            yield from _lines(value, tree[field.name], margin + _INDENT, seen)
        else:
            yield indent(yaml.safe_dump({field.name: tree[field.name]}, sort_keys=False, width=width), margin)


def _comments(cls: type) -> dict[str, str]:
    """What is said of each field of a dataclass: in the docstring below it, or among its class's attributes."""
    found = {
        name: " ".join(text.split())
        for names, text in _ATTRIBUTE.findall((inspect.getdoc(cls) or "").partition("Attributes:\n")[2])
        for name in names.split(", ")
    }
    # Python keeps no docstrings of fields.
    body = ast.parse(dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, text in pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = inspect.cleandoc(str(ast.literal_eval(text.value)))
    return found
