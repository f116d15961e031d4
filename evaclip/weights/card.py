"""Model cards: the README.md of a folder of weights, with the header that the Hugging Face hub reads."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evaclip.errors import unknown_name
from evaclip.outputs import check_output
from evaclip.run_files import CONFIG_FILE, LOG_FILE

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
        **_reached(config, records),
        "Optimizer": f"{optim['name']}, peak rate {optim['lr']:g}, weight decay {optim['weight_decay']:g}",
        "Precision": config["precision"],
        "Seed": config["seed"],
    }
    facts: dict[str, Any] = {"details": details}
    if evaluations:
        newest = evaluations[-1]
        told = {name: "not measured" if value is None else f"{value:.6g}" for name, value in newest["eval"].items()}
        rows = "".join(f"| {name} | {text} |\n" for name, text in told.items())
        facts["evaluation"] = f"At step {newest['step']:,}:\n\n| measure | value |\n|---|---|\n{rows}"
    return facts


def _reached(config: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """How far it came, if a step has been logged."""
    if not records:
        return {"Loss": config["loss"]["name"]}
    last = records[-1]
    return {
        "Steps": f"{last['step']:,} of {config['batch_size']:,} pairs, {last['samples']:,} in all",
        "Loss": f"{config['loss']['name']}, at the end {last['loss']:.4g}",
    }


def is_of_run(source: str | Path | None) -> bool:
    """Whether this is the folder of a run that has logged something, or a checkpoint in one."""
    folder = Path(source or "")
    places = (folder, folder.absolute().parent.parent)
    return bool(source) and folder.is_dir() and any(_is_run(each) for each in places)


def _is_run(folder: Path) -> bool:
    log = folder / LOG_FILE
    return (folder / CONFIG_FILE).is_file() and log.is_file() and '"loss"' in log.read_text(encoding="utf-8")


def card_beside(target: Path, source: str | Path | None, *, overwrite: bool) -> tuple[Path, str] | None:
    """The card of a file of weights, `NAME.safetensors.md` beside it, and its text; None for weights of no run.

    Raises:
        UserError: it may not be written.
    """
    if source is None or not is_of_run(source):
        return None
    path = target.with_name(f"{target.name}.md")
    check_output(path, overwrite=overwrite)
    return path, card_text(run_facts(source), target.stem)


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
