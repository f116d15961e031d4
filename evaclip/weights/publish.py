"""A trained model as a folder and as a repository of the Hugging Face hub, for open_clip and for evaclip to load."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from evaclip.atomic import write_json, write_text, writing
from evaclip.errors import UserError
from evaclip.extras import with_remedy
from evaclip.model.clip import CLIP
from evaclip.outputs import check_output
from evaclip.tokenizer import Tokenizer
from evaclip.weights.card import CARD_FILE, card_text, check_card, run_facts
from evaclip.weights.files import save_tensors
from evaclip.weights.hub import HUB, LOCAL
from evaclip.weights.layouts import to_open_clip
from evaclip.weights.open_clip_config import CONFIG_FILE, to_open_clip_config
from evaclip.weights.shards import is_sharded

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
    """Writes a folder that `create_model("local-dir:FOLDER")` loads, of evaclip and of open_clip: configuration, model
    card, and the weights under open_clip's names, in their dtypes.

    Args:
        model: has a configuration that open_clip has, too: one of the EVA01 and EVA02 models that it lists.
        tokenizer, model_config: taken as in open_clip's calls; the model knows both itself.
        save_directory: the folder; it is made if it isn't there.
        safe_serialization: True for a `.safetensors` file, False for one of `torch.save`, or `"both"`.
        skip_weights: write the configuration and the card only.
        model_card: what the card says: `license`, `tags`, `datasets`, `description`, `details` (a mapping), `usage`,
            `comparison`, `citation`.
        run: the run folder, or the checkpoint in it, that the weights are of: the card then tells data, recipe, steps
            and evaluations.
        overwrite: replace files that are there.

    Raises:
        UserError: for a model that open_clip doesn't have, a tokenizer of another kind, or files that may not be
            written.

    Example:
        `evaclip.save_for_hf(model, save_directory="my-clip")`
    """
    if not str(save_directory):
        raise UserError("save_directory isn't given: name the folder to write")
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
    """Pushes what `save_for_hf` writes to a repository of the hub, which is made if it isn't there.

    A model card that the repository has stays as it is.

    Args:
        repo_id: `OWNER/NAME`, or `NAME` of one's own.
        token: None for that of `hf auth login` or HF_TOKEN.
        revision: the branch; None for main.
        private: whether a new repository is private.
        create_pr: make a pull request instead of a commit.
        model, tokenizer, model_config, model_card, safe_serialization, run: as for `save_for_hf`.

    Returns:
        The address of the commit, an object of huggingface_hub with more facts.

    Raises:
        UserError: as `save_for_hf`, or when the hub can't be reached or refuses.

    Example:
        `evaclip.push_to_hf_hub(model, repo_id="me/my-clip", private=True)`
    """
    if not repo_id:
        raise UserError("repo_id isn't given: name the repository, OWNER/NAME")
    try:
        from huggingface_hub import HfApi, errors
    except ModuleNotFoundError as exc:
        raise with_remedy(exc) from exc
    files = _weight_files(safe_serialization, skip=False)
    # Before anything is made on the hub.
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
    for name in (*weights, CONFIG_FILE, *([] if card is None else [CARD_FILE])):
        check_output(folder / name, overwrite=overwrite)
    state = to_open_clip(model.state_dict()) if weights else {}
    for name in weights:
        save_tensors(state, folder / name)
    write_json(folder / CONFIG_FILE, config)
    if card is not None:
        with writing(folder / CARD_FILE):
            write_text(folder / CARD_FILE, card)


def _described(model: CLIP, tokenizer: Tokenizer | None) -> dict[str, Any]:
    if not isinstance(model, CLIP):
        raise UserError(f"expected a model of evaclip.create_model, got a {type(model).__name__}")
    if is_sharded(model):
        raise UserError("the model is cut over several processes; load its checkpoint with create_model")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise UserError(f"expected the tokenizer of evaclip.get_tokenizer or None, got a {type(tokenizer).__name__}")
    return to_open_clip_config(model.config)


def _weight_files(safe_serialization: bool | str, skip: bool) -> tuple[str, ...]:
    if safe_serialization not in _FILES:
        raise UserError(f"safe_serialization is {safe_serialization!r}; expected True, False or 'both'")
    return () if skip else _FILES[safe_serialization]


def _card(facts: Mapping[str, Any] | None, run: str | Path | None, name: str, source: str) -> str:
    usage = "\n".join(_USAGE.format(library=each, source=source) for each in ("evaclip", "open_clip"))
    told, facts = run_facts(run) if run else {}, facts or {}
    check_card(facts)
    details = {**told.get("details", {}), **facts.get("details", {})}
    return card_text({"library_name": "open_clip", "usage": usage, **told, **facts, "details": details}, name)


def _reason(exc: Exception, errors: Any) -> str:
    """One line, with what to do where that is known."""
    status = getattr(getattr(exc, "response", None), "status_code", None)
    if isinstance(exc, errors.LocalTokenNotFoundError) or status == 401:
        return "there is no valid token; run `hf auth login`, set HF_TOKEN or pass token="
    if status == 403:
        return "the token may not write there; it needs the right to write to this owner's repositories"
    if isinstance(exc, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return f"{type(exc).__name__}: {' '.join(str(exc).split())}"
