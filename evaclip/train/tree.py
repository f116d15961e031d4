"""Configurations as nested dicts of plain values, as YAML holds them."""

from collections.abc import Mapping
from typing import Any

Tree = dict[str, Any]


def nest(path: str, value: Any) -> Tree:
    """`nest("a.b", 1)` is `{"a": {"b": 1}}`."""
    for key in reversed(path.split(".")):
        value = {key: value}
    tree: Tree = value
    return tree


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> Tree:
    """`base`, with leaves replaced by the leaves of `change`."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines `key: old -> new` for each leaf that differs."""
    lines = []
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old} -> {new}")
    return lines
