"""The released EVA-CLIP weights and where the Hugging Face hub has them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HubFile:
    """A file of a repository of the hub."""

    repository: str
    name: str


def _original(name: str) -> HubFile:
    return HubFile("QuanSun/EVA-CLIP", name)


def _open_clip(repository: str) -> HubFile:
    return HubFile(f"timm/{repository}", "open_clip_model.safetensors")


# Model -> tag -> file. `eva_clip` is the authors' own file; the other tags are open_clip's, of the same
# weights.
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
}
