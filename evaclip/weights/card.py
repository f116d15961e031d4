"""Model cards: the README.md of a folder of weights, with the header that the Hugging Face hub reads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from evaclip.errors import unknown_name
from evaclip.run_files import CONFIG_FILE

CARD_FILE = "README.md"
_CARD_PARTS = (
    *("library_name", "license", "tags", "datasets", "pipeline_tag"),
    *("description", "details", "evaluation", "usage", "comparison", "citation"),
)
_CHECKPOINT = re.compile(r"step_(\d+)")


def check_card(facts: Mapping[str, Any]) -> None:
    """Raises UserError for a part that no card has."""
    for name in facts:
        if name not in _CARD_PARTS:
            raise unknown_name("part of a model card", name, _CARD_PARTS)


def run_facts(source: str | Path) -> dict[str, Any]:
    """What a run says of itself, as parts of a card.

    Args:
        source: a run folder, or one of its checkpoints, which counts up to its step.

    Raises:
        UserError: it is neither.
    """
    from evaclip.report.run_data import read_log_of

    folder, last = Path(source), None
    if match := _CHECKPOINT.fullmatch(folder.name):
        folder, last = folder.parent.parent, int(match[1])
    config, log = read_log_of(folder)
    log = [record for record in log if last is None or record["step"] <= last]
    records = [record for record in log if record.get("loss") is not None]
    evaluations = [record for record in log if "eval" in record]
    data, optim = config["data"], config["optim"]
    sets = [part["train"] for part in data["mixture"].values()] if data.get("mixture") else [data["train"]]
    details = {
        "Model": config["model"]["name"],
        "Starts from": [v for k, v in config["model"].items() if k.startswith("pretrained") and v] or "random values",
        "Training data": sets,
        "Steps": f"{records[-1]['step']:,} of {config['batch_size']:,} pairs, {records[-1]['samples']:,} in all",
        "Loss": f"{config['loss']['name']}, at the end {records[-1]['loss']:.4g}",
        "Optimizer": f"{optim['name']}, peak rate {optim['lr']:g}, weight decay {optim['weight_decay']:g}",
        "Precision": config["precision"],
        "Seed": config["seed"],
    }
    facts: dict[str, Any] = {"details": details}
    if evaluations:
        newest = evaluations[-1]
        rows = "".join(f"| {name} | {value:.6g} |\n" for name, value in newest["eval"].items())
        facts["evaluation"] = f"At step {newest['step']:,}:\n\n| measure | value |\n|---|---|\n{rows}"
    return facts


def is_of_run(source: str | Path | None) -> bool:
    """Whether this is a run folder or a checkpoint in one."""
    folder = Path(source or "")
    places = (folder, folder.absolute().parent.parent)
    return bool(source) and folder.is_dir() and any((each / CONFIG_FILE).is_file() for each in places)


def card_text(facts: Mapping[str, Any], name: str) -> str:
    """The text of a model card, with the header that the hub reads."""
    header = {
        **{key: facts[key] for key in ("library_name",) if key in facts},
        "tags": list(facts.get("tags", ["clip"])),
        "pipeline_tag": facts.get("pipeline_tag", "zero-shot-image-classification"),
        **{key: facts[key] for key in ("license", "datasets") if key in facts},
    }
    details = "\n".join(f"- **{key}:** {_listed(value)}" for key, value in facts.get("details", {}).items())
    citations = facts.get("citation", [])
    cited = [f"```bibtex\n{text}\n```" for text in ([citations] if isinstance(citations, str) else citations)]
    sections = {
        "Details": details,
        "Evaluation": facts.get("evaluation", ""),
        "Usage": facts.get("usage", ""),
        "Comparison": facts.get("comparison", ""),
        "Citation": "\n".join(cited),
    }
    told = [f"# {name}", facts.get("description", "")]
    told += [f"## {title}\n\n{text.strip()}" for title, text in sections.items() if text]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n" + "\n\n".join(filter(None, told)) + "\n"


def _listed(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{key}: {each}" for key, each in value.items()]
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
