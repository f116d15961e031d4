"""Publish a trained model as a folder or a repository of the Hugging Face hub, with a model card."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import yaml

from evaclip.atomic import write_json, write_text, writing
from evaclip.errors import UserError, unknown_name
from evaclip.extras import with_remedy
from evaclip.model.clip import CLIP
from evaclip.model.hf_text import HFTokenizer
from evaclip.outputs import check_output
from evaclip.runs.files import CONFIG_FILE, LOG_FILE
from evaclip.runs.log import read_config_and_log
from evaclip.tokenizer import Tokenizer
from evaclip.weights.config_files import OPEN_CLIP_CONFIG_FILE, to_open_clip_config
from evaclip.weights.files import AVERAGE, RAW, save_tensors
from evaclip.weights.hub import HUB, LOCAL
from evaclip.weights.layouts import to_open_clip
from evaclip.weights.shards import is_sharded

CARD_FILE = "README.md"
_CARD_PARTS = (
    *("library_name", "license", "tags", "datasets", "pipeline_tag"),
    *("description", "details", "evaluation", "usage", "comparison", "citation"),
)
_KINDS = {
    "contrastive": ("clip", "zero-shot-image-classification", "pairs", None),
    "classification": ("image-classification", "image-classification", "images", "cross-entropy"),
    "masked_image": ("image-feature-extraction", "image-feature-extraction", "images", "cosine to the teacher"),
}
"""Tag, pipeline of the hub, samples and loss of each task; None for the loss that the configuration names."""
_CHECKPOINT = re.compile(r"step_(\d+)")
SAFE_FILE = "open_clip_model.safetensors"
PICKLE_FILE = "open_clip_pytorch_model.bin"
_FILES: dict[bool | str, tuple[str, ...]] = {
    True: (SAFE_FILE,),
    False: (PICKLE_FILE,),
    "both": (SAFE_FILE, PICKLE_FILE),
}
_USAGE = """\
```python
import {library}

model, preprocess = {library}.create_model_from_pretrained("{source}")
tokenizer = {library}.get_tokenizer("{source}")
```
"""


def run_facts(source: str | Path, *, average: bool = True) -> dict[str, Any]:
    """Parts of a model card from the configuration and the log of a run.

    Args:
        source: a run folder, or one of its checkpoints (the log is then read up to its step).
        average: the card is of the moving average, if the run has one, which the run evaluates. A card of its raw
            weights has no evaluation.

    Raises:
        UserError: it is neither.
    """
    folder, last = Path(source), None
    if match := _CHECKPOINT.fullmatch(folder.name):
        folder, last = folder.parent.parent, int(match[1])
    config, log = read_config_and_log(folder)
    log = [record for record in log if last is None or record["step"] <= last]
    records = [record for record in log if record.get("loss") is not None]
    evaluations = [record for record in log if "eval" in record]
    data, optim, decay = config["data"], config["optim"], config.get("ema_decay")
    task = config.get("task", {}).get("name", "contrastive")
    tag, pipeline, *_ = _KINDS[task]
    sets = [item["train"] for item in data["mixture"].values()] if data.get("mixture") else [data["train"]]
    details = {
        "Model": config["model"]["name"],
        "Weights": AVERAGE if average and decay is not None else RAW,
        "Starts from": [v for k, v in config["model"].items() if k.startswith("pretrained") and v] or "random values",
        "Training data": sets,
        **_progress(config, records, task),
        "Optimizer": f"{optim['name']}, peak rate {optim['lr']:g}, weight decay {optim['weight_decay']:g}",
        "Precision": config["precision"],
        "Seed": config["seed"],
    }
    facts: dict[str, Any] = {"tags": [tag], "pipeline_tag": pipeline, "details": details}
    if evaluations and (average or decay is None):
        newest = evaluations[-1]
        values = {name: "not measured" if value is None else f"{value:.6g}" for name, value in newest["eval"].items()}
        rows = "".join(f"| {name} | {value} |\n" for name, value in values.items())
        facts["evaluation"] = f"At step {newest['step']:,}:\n\n| measure | value |\n|---|---|\n{rows}"
    return facts


def _progress(config: Mapping[str, Any], records: Sequence[Mapping[str, Any]], task: str) -> dict[str, str]:
    """Steps and loss, if a step has been logged."""
    *_, samples, loss = _KINDS[task]
    loss = loss or config["loss"]["name"]
    if not records:
        return {"Loss": loss}
    last = records[-1]
    return {
        "Steps": f"{last['step']:,} of {config['batch_size']:,} {samples}, {last['samples']:,} in all",
        "Loss": f"{loss}, at the end {last['loss']:.4g}",
    }


def prepare_card(
    target: Path, source: str | Path | None, *, overwrite: bool, average: bool = True
) -> tuple[Path, str] | None:
    """Path and text of the card next to a weights file, `NAME.safetensors.md`.

    Args:
        target: the weights file.
        source: a run folder that has logged a loss, or a checkpoint in one; None is returned for anything else.
        overwrite: replace the card if it exists.
        average: as for `run_facts`.

    Raises:
        UserError: it may not be written.
    """
    if source is None or not has_run_facts(source):
        return None
    path = target.with_name(f"{target.name}.md")
    check_output(path, overwrite=overwrite)
    return path, card_text(run_facts(source, average=average), target.stem)


def has_run_facts(source: str | Path) -> bool:
    """Whether the source is a run folder that has logged a loss, or a checkpoint in one."""
    folder = Path(source)
    return folder.is_dir() and any(map(_is_run, (folder, folder.absolute().parent.parent)))


def _is_run(folder: Path) -> bool:
    log = folder / LOG_FILE
    return (folder / CONFIG_FILE).is_file() and log.is_file() and '"loss"' in log.read_text(encoding="utf-8")


def card_text(facts: Mapping[str, Any], name: str) -> str:
    """The text of a model card, with the header that the hub reads."""
    header = {
        **{key: facts[key] for key in ("library_name",) if key in facts},
        "tags": list(facts.get("tags", ["clip"])),
        "pipeline_tag": facts.get("pipeline_tag", "zero-shot-image-classification"),
        **{key: facts[key] for key in ("license", "datasets") if key in facts},
    }
    details = "\n".join(f"- **{key}:** {_inline(value)}" for key, value in facts.get("details", {}).items())
    citations = facts.get("citation", [])
    cited = [f"```bibtex\n{text}\n```" for text in ([citations] if isinstance(citations, str) else citations)]
    sections = {
        "Details": details,
        "Evaluation": facts.get("evaluation", ""),
        "Usage": facts.get("usage", ""),
        "Comparison": facts.get("comparison", ""),
        "Citation": "\n".join(cited),
    }
    parts = [f"# {name}", facts.get("description", "")]
    parts += [f"## {title}\n\n{text.strip()}" for title, text in sections.items() if text]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n" + "\n\n".join(filter(None, parts)) + "\n"


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{key}: {each}" for key, each in value.items()]
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def save_for_hf(
    model: CLIP,
    tokenizer: Tokenizer | None = None,
    model_config: Mapping[str, Any] | None = None,
    save_directory: str | Path = "",
    safe_serialization: bool | Literal["both"] = True,
    skip_weights: bool = False,
    *,
    model_card: Mapping[str, Any] | None = None,
    run: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a folder that `create_model("local-dir:FOLDER")` of evaclip and of open_clip loads.

    The folder has the configuration, a model card, and the weights under open_clip's names, in their dtypes.

    Args:
        model: of a configuration that open_clip has too: one of the EVA01 and EVA02 models that it lists.
        tokenizer, model_config: accepted as in open_clip's calls; the model has both.
        save_directory: the folder; it is made if it doesn't exist.
        safe_serialization: True for a `.safetensors` file, False for one of `torch.save`, or `"both"`.
        skip_weights: write the configuration and the card only.
        model_card: parts of the card: `license`, `tags`, `datasets`, `description`, `details` (a mapping), `usage`,
            `comparison`, `citation`.
        run: run folder of the weights, or the checkpoint in it, as `create_model` loads them: the card then has data,
            recipe, steps and evaluations.
        overwrite: replace existing files.

    Raises:
        UserError: for a model that open_clip doesn't have, a tokenizer of another kind, or files that may not be
            written.

    Example:
        `evaclip.save_for_hf(model, save_directory="my-clip")`
    """
    if not str(save_directory):
        raise UserError("save_directory must be the folder to write, got ''")
    card = _card(model_card, run, Path(save_directory).name, f"{LOCAL}{save_directory}")
    _save(model, tokenizer, Path(save_directory), _weight_files(safe_serialization, skip_weights), card, overwrite)


def push_to_hf_hub(
    model: CLIP,
    tokenizer: Tokenizer | None = None,
    model_config: Mapping[str, Any] | None = None,
    repo_id: str = "",
    commit_message: str = "Add model",
    token: str | None = None,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    model_card: Mapping[str, Any] | None = None,
    safe_serialization: bool | Literal["both"] = True,
    *,
    run: str | Path | None = None,
) -> str:
    """Push the files of `save_for_hf` to a repository of the hub, which is made if it doesn't exist.

    A model card that the repository has stays as it is.

    Args:
        repo_id: `OWNER/NAME`, or `NAME` for your own account.
        token: None for the token of `hf auth login` or HF_TOKEN.
        revision: the branch; None for main.
        private: whether a new repository is private.
        create_pr: make a pull request instead of a commit.
        model, tokenizer, model_config, model_card, safe_serialization, run: as for `save_for_hf`.

    Returns:
        The URL of the commit, a `CommitInfo` of huggingface_hub.

    Raises:
        UserError: as `save_for_hf`, or when the hub can't be reached or refuses.

    Example:
        `evaclip.push_to_hf_hub(model, repo_id="me/my-clip", private=True)`
    """
    if not repo_id:
        raise UserError("repo_id must be OWNER/NAME, got ''")
    try:
        from huggingface_hub import HfApi, errors
    except ModuleNotFoundError as exc:
        raise with_remedy(exc) from exc
    files = _weight_files(safe_serialization, skip=False)
    # Check everything before anything is made on the hub.
    _card(model_card, run, "", "")
    _described(model, tokenizer)
    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            has_card = api.file_exists(repo_id, CARD_FILE, revision=revision)
            card = None if has_card else _card(model_card, run, repo_id.rpartition("/")[2], f"{HUB}{repo_id}")
            _save(model, tokenizer, Path(folder), files, card)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )
        except UserError:
            raise
        except Exception as exc:  # The hub's client raises those of several libraries.
            raise UserError(f"can't push to {repo_id} on the Hugging Face hub: {_reason(exc, errors)}") from exc


def _save(
    model: CLIP,
    tokenizer: Tokenizer | None,
    folder: Path,
    weights: tuple[str, ...],
    card: str | None,
    overwrite: bool = False,
) -> None:
    config = _described(model, tokenizer)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name in (*weights, OPEN_CLIP_CONFIG_FILE, *([] if card is None else [CARD_FILE])):
        check_output(folder / name, overwrite=overwrite)
    state = to_open_clip(model.state_dict()) if weights else {}
    for name in weights:
        save_tensors(state, folder / name)
    write_json(folder / OPEN_CLIP_CONFIG_FILE, config)
    if card is not None:
        with writing(folder / CARD_FILE):
            write_text(folder / CARD_FILE, card)


def _described(model: CLIP, tokenizer: Tokenizer | None) -> dict[str, Any]:
    if not isinstance(model, CLIP):
        raise UserError(f"model must be one of evaclip.create_model, got a {type(model).__name__}")
    if is_sharded(model):
        raise UserError("model must be whole, got a sharded one; load its checkpoint with create_model")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer | HFTokenizer):
        raise UserError(f"tokenizer must be one of evaclip.get_tokenizer or None, got a {type(tokenizer).__name__}")
    return to_open_clip_config(model.config)


def _weight_files(safe_serialization: bool | str, skip: bool) -> tuple[str, ...]:
    if safe_serialization not in _FILES:
        raise UserError(f"safe_serialization must be True, False or 'both', got {safe_serialization!r}")
    return () if skip else _FILES[safe_serialization]


def _card(facts: Mapping[str, Any] | None, run: str | Path | None, name: str, source: str) -> str:
    usage = "\n".join(_USAGE.format(library=each, source=source) for each in ("evaclip", "open_clip"))
    of_run, facts = run_facts(run) if run else {}, facts or {}
    if unknown := [part for part in facts if part not in _CARD_PARTS]:
        raise unknown_name("part of a model card", unknown[0], _CARD_PARTS)
    details = {**of_run.get("details", {}), **facts.get("details", {})}
    return card_text({"library_name": "open_clip", "usage": usage, **of_run, **facts, "details": details}, name)


def _reason(exc: Exception, errors: Any) -> str:
    """One line, with the remedy where it is known."""
    status = getattr(getattr(exc, "response", None), "status_code", None)
    if isinstance(exc, errors.LocalTokenNotFoundError) or status == 401:
        return "there is no valid token; run `hf auth login`, set HF_TOKEN or pass token="
    if status == 403:
        return "the token may not write there; it needs the right to write to this owner's repositories"
    if isinstance(exc, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return f"{type(exc).__name__}: {' '.join(str(exc).split())}"
