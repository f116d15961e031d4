"""Configurations as nested dicts of plain values, as YAML holds them; keys of earlier versions."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

Tree = dict[str, Any]

_RENAMED = {
    "accumulation": "accumulation_steps",
    "collect_every": "gc_every_steps",
    "held_out": "validation_split",
    "data.max_bad_share": "max_bad_fraction",
    "eval.sets.*.max_bad_share": "max_bad_fraction",
    "eval.sets.*.first": "skip",
    "eval.sets.*.measure": "metrics",
    "parallel.reshard": "reshard_after_forward",
    "schedule.cooldown_share": "cooldown_fraction",
    "schedule.warmup_share": "warmup_fraction",
    "schedule.resolutions.share": "fraction",
    "spikes.deviations": "threshold_sigma",
}
"""Keys of earlier versions, and the last part of their present names."""
REMOVED = {
    "checkpoint.background": True,
    "log.wandb.entity": None,
    "log.wandb.mode": None,
    "task.erasing_count": 1,
    "task.erasing_mode": "pixel",
}
"""Keys of earlier versions that don't exist any more, and their defaults, which are still accepted."""


def with_new_names(tree: Mapping[str, Any], prefix: str = "") -> Tree:
    """The tree with keys of earlier versions under their present names, and without removed keys at their defaults."""
    renamed = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if path in REMOVED and value == REMOVED[path]:
            continue
        name = next((new for old, new in _RENAMED.items() if fnmatchcase(path, old)), key)
        values = value if isinstance(value, list) else [value]
        found = [with_new_names(each, f"{path}.") if isinstance(each, Mapping) else each for each in values]
        renamed[name] = found if isinstance(value, list) else found[0]
    return renamed


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
