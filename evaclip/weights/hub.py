"""Weights on the Hugging Face hub: released models, names, download and checksum.

Cache, offline mode, mirrors and tokens are those of huggingface_hub and its environment variables (HF_HOME,
HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN); an interrupted download continues where it stopped.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from evaclip.errors import UserError, unknown_name

HUB = "hf-hub:"
"""Prefix of a repository on the hub."""
LOCAL = "local-dir:"
"""Prefix of a local folder with the files of a repository."""
_NAME = re.compile(r"(?P<repository>[^/@]+/[^/@]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>.+))?")
# Files that are looked for in a repository, in this order.
_USUAL = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """A file in a repository of the hub."""

    repository: str
    name: str


def _original(name: str) -> HubFile:
    return HubFile("QuanSun/EVA-CLIP", name)


def _open_clip(repository: str) -> HubFile:
    return HubFile(f"timm/{repository}", "open_clip_model.safetensors")


# Model -> tag -> file. `eva_clip` is the authors' file; the other tags of the same weights are open_clip's.
RELEASED: dict[str, dict[str, HubFile]] = {
    "EVA01-CLIP-g-14": {
        "eva_clip": _original("EVA01_CLIP_g_14_psz14_s11B.pt"),
        "laion400m_s11b_b41k": _open_clip("eva_giant_patch14_clip_224.laion400m_s11b_b41k"),
    },
    "EVA01-CLIP-g-14-plus": {
        "eva_clip": _original("EVA01_CLIP_g_14_plus_psz14_s11B.pt"),
        "merged2b_s11b_b114k": _open_clip("eva_giant_patch14_plus_clip_224.merged2b_s11b_b114k"),
    },
    "EVA02-CLIP-B-16": {
        "eva_clip": _original("EVA02_CLIP_B_psz16_s8B.pt"),
        "merged2b_s8b_b131k": _open_clip("eva02_base_patch16_clip_224.merged2b_s8b_b131k"),
    },
    "EVA02-CLIP-L-14": {
        "eva_clip": _original("EVA02_CLIP_L_psz14_s4B.pt"),
        "merged2b_s4b_b131k": _open_clip("eva02_large_patch14_clip_224.merged2b_s4b_b131k"),
    },
    "EVA02-CLIP-L-14-336": {
        "eva_clip": _original("EVA02_CLIP_L_336_psz14_s6B.pt"),
        "merged2b_s6b_b61k": _open_clip("eva02_large_patch14_clip_336.merged2b_s6b_b61k"),
    },
    "EVA02-CLIP-bigE-14": {
        "eva_clip": _original("EVA02_CLIP_E_psz14_s4B.pt"),
        "laion2b_s4b_b115k": _open_clip("eva02_enormous_patch14_clip_224.laion2b_s4b_b115k"),
    },
    "EVA02-CLIP-bigE-14-plus": {
        "eva_clip": _original("EVA02_CLIP_E_psz14_plus_s9B.pt"),
        "laion2b_s9b_b144k": _open_clip("eva02_enormous_patch14_plus_clip_224.laion2b_s9b_b144k"),
    },
    "EVA-CLIP-8B": {"eva_clip": HubFile("BAAI/EVA-CLIP-8B", "EVA_CLIP_8B_psz14_s9B.pt")},
    "EVA-CLIP-8B-plus": {"eva_clip": HubFile("BAAI/EVA-CLIP-8B-448", "EVA_CLIP_8B_psz14_plus_s0.6B.pt")},
    "EVA-CLIP-18B": {"eva_clip": HubFile("BAAI/EVA-CLIP-18B", "EVA_CLIP_18B_psz14_s6B.fp16.pt")},
    "SigLIP2-B-16-NaFlex": {"webli": HubFile("google/siglip2-base-patch16-naflex", "model.safetensors")},
    "SigLIP2-SO400M-16-NaFlex": {"webli": HubFile("google/siglip2-so400m-patch16-naflex", "model.safetensors")},
}


def download(source: str) -> Path:
    """Local file of `hf-hub:OWNER/NAME` or `hf-hub:OWNER/NAME/FILE`, either with `@REVISION`.

    For weights in several files this is the index, next to the files.

    Raises:
        UserError: for a name of another form, or if the hub doesn't have it or can't be reached.
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


def download_file(source: str, name: str) -> Path:
    """Local copy of another file in the repository and revision of `source`.

    Raises:
        UserError: as `download`.
    """
    match = _matched(source)
    path = _fetch(HubFile(match["repository"], name), match["revision"])
    assert path is not None
    return path


def find_in_folder(source: str) -> Path:
    """Weights file in the folder of `local-dir:FOLDER`.

    Raises:
        UserError: it has none under a usual name.
    """
    folder = Path(source.removeprefix(LOCAL)).expanduser()
    for name in _USUAL:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"the folder {str(folder)!r} has none of {', '.join(_USUAL)}")


def download_released(model: str, tag: str) -> Path:
    """Local file of released weights, downloaded unless it is in the hub's cache.

    Raises:
        UserError: for a tag that the model doesn't have, or if the hub can't be reached.
    """
    tags = RELEASED.get(model, {})
    if not tags:
        raise UserError(
            f"pretrained must be a file or folder, as {model} has no released weights, got {tag!r}; without weights in"
            " training: --pretrained ''"
        )
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
    """Local copy; None for an optional file that the repository doesn't have."""
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    what = "weights" if optional else file.name
    known = isinstance(try_to_load_from_cache(file.repository, file.name, revision=revision), str)
    try:
        local = not _is_reachable(file, revision)
        path = Path(hf_hub_download(file.repository, file.name, revision=revision, local_files_only=local))
    except errors.LocalEntryNotFoundError as exc:
        reason = "it isn't in the cache, and the hub can't be reached or is offline"
        raise _failure(file, what, reason) from exc
    except errors.EntryNotFoundError as exc:
        if optional:
            return None
        raise UserError(f"{file.repository} on the Hugging Face hub has no file {file.name}") from exc
    except Exception as exc:  # the hub's client raises errors of several libraries
        raise _failure(file, what, type(exc).__name__) from exc
    if not known:
        _verify(path, file)
    return path


def _is_reachable(file: HubFile, revision: str | None) -> bool:
    """Whether the hub answers one request; `hf_hub_download` would retry for half a minute."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(file.repository, file.name, revision=revision))
    except errors.HfHubHTTPError:
        return True  # an error that the download reports
    except Exception:  # no network; the error depends on the client's library
        return False
    return True


def _failure(file: HubFile, what: str, reason: str) -> UserError:
    return UserError(
        f"can't get {what} of {file.repository} from the Hugging Face hub ({reason}); "
        "where there is no network, download the file elsewhere and give its path"
    )


def _verify(path: Path, file: HubFile) -> None:
    """Compare a download with its SHA-256, which is the name of large files in the cache; remove a damaged one."""
    blob = path.resolve()
    if blob == path.absolute() or not _SHA256.fullmatch(blob.name):
        return
    with blob.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != blob.name:
        path.unlink()
        blob.unlink()
        raise UserError(
            f"{file.name} of {file.repository} arrived damaged and was removed: its SHA-256 is {digest}, expected "
            f"{blob.name}; try again"
        )
