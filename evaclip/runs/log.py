"""Configuration and log of a run, as files hold them."""

import json
from pathlib import Path
from typing import Any

import yaml

from evaclip.atomic import reading
from evaclip.errors import UserError
from evaclip.redact import redacted
from evaclip.runs.files import CONFIG_FILE, LOG_FILE


def read_config_and_log(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The configuration of a run, without credentials, and its whole log.

    Raises:
        UserError: it is not a run folder, or nothing was logged yet.
    """
    for name in (LOG_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{str(folder)!r} is not a run folder: it has no {name}; `evaclip train` writes one")
    log = read_log(folder / LOG_FILE)
    if not any(record.get("loss") is not None for record in log):
        raise UserError(f"{folder / LOG_FILE} holds no losses yet: train for some steps first")
    return redacted(load_yaml(folder / CONFIG_FILE)), log


def load_yaml(path: str | Path) -> dict[str, Any]:
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


def read_log(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines log; a last line that was cut off is left out."""
    if not path.exists():
        return []
    with reading(path):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


def is_share(metric: str) -> bool:
    """Whether this metric of an evaluation is in [0, 1]."""
    return metric.rpartition("/")[2] not in ("loss", "seconds")
