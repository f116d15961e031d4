"""Weights on the Hugging Face hub: what a name stands for, the download, and its checksum.

Cache, offline mode, mirrors and tokens are those of huggingface_hub and its environment variables (HF_HOME,
HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN); a broken download goes on where it stopped.
"""

import hashlib
import json
import re
from pathlib import Path

from evaclip.errors import UserError, unknown_name
from evaclip.weights.released import RELEASED, HubFile

HUB = "hf-hub:"
"""What a source on the hub begins with."""
LOCAL = "local-dir:"
"""What a source begins with that is a folder laid out as a repository of the hub."""

_NAME = re.compile(r"(?P<repository>[^/@]+/[^/@]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>.+))?")
# What a repository without a named file is searched for; the first that it has is taken.
_USUAL = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def download(source: str) -> Path:
    """The local file of `hf-hub:OWNER/NAME`, `hf-hub:OWNER/NAME/FILE`, either with `@REVISION`.

    Of weights in several parts it is the index, and the parts lie beside it.

    Raises:
        UserError: for a name of another form, or when the hub doesn't have it or can't be reached.
    """
    match = _matched(source)
    repository, revision = match["repository"], match["revision"]
    for name in [match["file"]] if match["file"] else _USUAL:
        path = _fetch(HubFile(repository, name), revision, optional=not match["file"])
        if path is not None:
            break
    else:
        raise UserError(f"{repository} on the hub has none of {', '.join(_USUAL)}; name a file: {source}/FILE")
    if path.name.endswith(".index.json"):
        folder = f"{Path(name).parent}/" if "/" in name else ""
        for part in sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())):
            _fetch(HubFile(repository, folder + part), revision)
    return path


def download_beside(source: str, name: str) -> Path:
    """The local copy of another file of the repository and the revision that `source` names.

    Raises:
        UserError: as `download`.
    """
    match = _matched(source)
    path = _fetch(HubFile(match["repository"], name), match["revision"])
    assert path is not None
    return path


def find_in_folder(source: str) -> Path:
    """The weights file in the folder of `local-dir:FOLDER`.

    Raises:
        UserError: there is none under a usual name.
    """
    folder = Path(source.removeprefix(LOCAL)).expanduser()
    for name in _USUAL:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"the folder {str(folder)!r} has none of {', '.join(_USUAL)}")


def download_released(model: str, tag: str) -> Path:
    """The local file of released weights, downloaded unless it is in the hub's cache.

    Raises:
        UserError: for a tag that the model doesn't have, or when the hub can't be reached.
    """
    tags = RELEASED.get(model, {})
    if not tags:
        raise UserError(f"no weights {tag!r}: it is no file or folder, and {model} has no released weights")
    if tag not in tags:
        raise unknown_name(f"file, folder or tag of released {model} weights", tag, tags)
    path = _fetch(tags[tag], None)
    assert path is not None
    return path


def _matched(source: str) -> re.Match[str]:
    match = _NAME.fullmatch(source.removeprefix(HUB))
    if match is None:
        raise UserError(f"{source!r} isn't a name on the hub; expected {HUB}OWNER/NAME[/FILE][@REVISION]")
    return match


def _fetch(file: HubFile, revision: str | None, optional: bool = False) -> Path | None:
    """The local copy; None for an optional file that the repository doesn't have."""
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    wanted = "weights" if optional else file.name
    known = isinstance(try_to_load_from_cache(file.repository, file.name, revision=revision), str)
    try:
        local = not known and not _is_reachable(file, revision)
        path = Path(hf_hub_download(file.repository, file.name, revision=revision, local_files_only=local))
    except errors.LocalEntryNotFoundError as exc:
        reason = "it isn't in the cache, and the hub can't be reached or isn't to be asked"
        raise _failure(file, wanted, reason) from exc
    except errors.EntryNotFoundError as exc:
        if optional:
            return None
        raise UserError(f"{file.repository} on the Hugging Face hub has no file {file.name}") from exc
    except Exception as exc:  # The hub's client raises those of several libraries; all mean the same here.
        raise _failure(file, wanted, type(exc).__name__) from exc
    if not known:
        _verify(path, file)
    return path


def _is_reachable(file: HubFile, revision: str | None) -> bool:
    """Whether the hub answers one request. `hf_hub_download` itself repeats a failed one for half a minute."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(file.repository, file.name, revision=revision))
    except errors.HfHubHTTPError:
        return True  # with an error, which the download reports
    except Exception:  # of no network, by whichever library the client uses
        return False
    return True


def _failure(file: HubFile, wanted: str, reason: str) -> UserError:
    return UserError(
        f"can't get {wanted} of {file.repository} from the Hugging Face hub ({reason}); "
        "where there is no network, download the file elsewhere and give its path"
    )


def _verify(path: Path, file: HubFile) -> None:
    """Compares a fresh download with its SHA-256, which the cache names large files after; a wrong one is removed."""
    blob = path.resolve()
    if blob == path.absolute() or not _SHA256.fullmatch(blob.name):
        return
    with blob.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != blob.name:
        path.unlink()
        blob.unlink()
        raise UserError(
            f"{file.name} of {file.repository} arrived damaged and was removed: its SHA-256 is {found}, the hub says "
            f"{blob.name}; try again"
        )
