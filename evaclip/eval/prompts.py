"""Class names and prompt templates: ImageNet's, which open_clip_torch carries as data, or a user's."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from evaclip.errors import UserError

IMAGENET = "imagenet"
PLACEHOLDER = "{}"

IMAGENET_CLASSNAMES: Sequence[str]
"""open_clip's list of the 1,000 cleaned class names, in the order of the labels."""
OPENAI_IMAGENET_TEMPLATES: Sequence[Callable[[str], str]]
"""open_clip's 80 templates of the CLIP paper, functions from a class's name to a sentence."""
SIMPLE_IMAGENET_TEMPLATES: Sequence[Callable[[str], str]]
"""The 7 of them that do nearly as well."""
_FROM_OPEN_CLIP = ("IMAGENET_CLASSNAMES", "OPENAI_IMAGENET_TEMPLATES", "SIMPLE_IMAGENET_TEMPLATES")


def __getattr__(name: str) -> Any:
    if name not in _FROM_OPEN_CLIP:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_open_clip_data(), name)


def prompts(classname: str, templates: Sequence[str]) -> list[str]:
    """The sentences that describe one class; each template holds `{}` once or more."""
    return [template.replace(PLACEHOLDER, classname) for template in templates]


def imagenet_classnames() -> tuple[str, ...]:
    """The 1,000 cleaned ImageNet class names, in the order of the labels."""
    return tuple(_open_clip_data().IMAGENET_CLASSNAMES)


def imagenet_templates() -> tuple[str, ...]:
    """The 80 prompt templates of the CLIP paper (arXiv 2103.00020, section 3.1.4)."""
    return tuple(template(PLACEHOLDER) for template in _open_clip_data().OPENAI_IMAGENET_TEMPLATES)


def load_classnames(given: str | Path) -> tuple[str, ...]:
    """`imagenet`, or a file with one class name a line (or a JSON list), in the order of the labels.

    Raises:
        UserError: no such file, or an empty name (with its line).
    """
    if str(given) == IMAGENET:
        return imagenet_classnames()
    return tuple(name for _, name in _read_list(Path(given), "class names"))


def load_templates(given: str | Path) -> tuple[str, ...]:
    """`imagenet`, one template itself (a text that holds `{}`), or a file with one a line (or a JSON list).

    Raises:
        UserError: no such file, or a template without the placeholder `{}` (with its line).
    """
    if str(given) == IMAGENET:
        return imagenet_templates()
    if PLACEHOLDER in str(given):
        return (str(given),)
    entries = _read_list(Path(given), "templates", f", or one template with {PLACEHOLDER}")
    for where, template in entries:
        if PLACEHOLDER not in template:
            raise UserError(f"{given}, {where}: template {template!r} lacks the placeholder {PLACEHOLDER}")
    return tuple(template for _, template in entries)


def _read_list(path: Path, what: str, more: str = "") -> list[tuple[str, str]]:
    """(where it stands, text) of every entry."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
        raise UserError(
            f"cannot read {what} from {str(path)!r}: {reason}; "
            f"give a file with one a line, a JSON list, or 'imagenet'{more}"
        ) from exc
    if path.suffix == ".json":
        entries = _parse_json(path, text)
    else:
        entries = [(f"line {number}", line.strip()) for number, line in enumerate(text.rstrip().splitlines(), 1)]
    for where, entry in entries:
        if not entry:
            raise UserError(f"{path}, {where}: empty; every line must hold one of the {what}")
    if not entries:
        raise UserError(f"{path} holds no {what}")
    return entries


def _parse_json(path: Path, text: str) -> list[tuple[str, str]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as exc:
        raise UserError(f"{path}, line {exc.lineno}: not valid JSON ({exc.msg})") from exc
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise UserError(f"{path}: expected a JSON list of texts, got {type(values).__name__}")
    for number, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise UserError(f"{path}, entry {number}: expected a text, got {json.dumps(value)}")
    return [(f"entry {number}", value.strip()) for number, value in enumerate(values, 1)]


@cache
def _open_clip_data() -> ModuleType:
    """The data file as a module of its own: the open_clip package, and all it imports, stays unloaded."""
    try:
        distribution = metadata.distribution("open_clip_torch")
    except metadata.PackageNotFoundError as exc:
        raise UserError(
            "ImageNet's class names and templates come from open_clip_torch, which is not installed: "
            "pip install 'evakernels[clip]'"
        ) from exc
    path = Path(str(distribution.locate_file("open_clip/zero_shot_metadata.py")))
    spec = importlib.util.spec_from_file_location("evaclip.eval._imagenet_prompts", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(
            f"open_clip_torch {distribution.version} has no {path.name}; evaclip needs open_clip_torch>=3.3"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
