"""Small models of timm, open_clip and transformers with random weights, built without downloads for sweep_dropin.py."""

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

MOST_PARAMETERS = 130_000_000
Inputs = dict[str, Any]
Built = tuple[nn.Module, dict[str, Inputs]]
"""A model and its calls by name: "plain", and those with padding masks."""


class Refused(Exception):
    """The model can't be built, called or accelerated; the message says why."""


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:150]}".splitlines()[0]


@contextmanager
def excepted(step: str) -> Iterator[None]:
    """Turns errors into `Refused`."""
    try:
        yield
    except (Refused, TimeoutError):
        raise
    except Exception as error:
        raise Refused(f"{step}: {first_line(error)}") from error


def check_size(model: nn.Module) -> None:
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > MOST_PARAMETERS:
        raise Refused(f"{count / 1e6:.0f} million parameters")


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The float tensors of the output."""
    torch.manual_seed(0)
    return [each for each in tree_leaves(model(**inputs)) if isinstance(each, Tensor) and each.is_floating_point()]


# --- timm ---

SIZE_WORDS = "test zepto atto femto pico nano xxtiny xtiny xxs xs tiny mini micro ti s small little m medium b base"
RANKS = {word: rank for rank, word in enumerate(SIZE_WORDS.split())}
LARGER = (
    "large xlarge xxlarge huge giant giantopt gigantic enormous plus lite light little wee betwixt mediumd dwee pwee"
)
WORDS = "|".join([*RANKS, *LARGER.split(), "dpwee", "dlittle"])
IS_SIZE = re.compile(rf"[a-z]{{0,2}}\d*|\d+.*|so(\d+m)?|som\d?|{WORDS}")
VARIANTS = "vision_transformer eva vision_transformer_relpos naflexvit beit deit swin_transformer"
"""Modules of timm with one model for each variant; the others have one model."""


def smallest(names: Iterable[str], family: Callable[[str], object]) -> list[str]:
    """The smallest model of each family, by the size words and numbers in its name."""

    def size(name: str) -> tuple[int, int, str]:
        words = re.split(r"[-_]", name.lower())
        numbers = [int(word) for word in words if word.isdigit()]
        return min((RANKS[word] for word in words if word in RANKS), default=len(RANKS)), max(numbers, default=0), name

    found: dict[object, str] = {}
    for name in sorted(names, key=size):
        found.setdefault(family(name), name)
    return sorted(found.values())


def variant(name: str) -> str:
    """The name without sizes."""
    words = re.split(r"[-_]", re.sub(r"(?<=[a-z])\d+", "", name.lower()))
    return "_".join(word for word in words if not IS_SIZE.fullmatch(word))


def timm_names() -> list[str]:
    import timm

    module_of = {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}
    variants = VARIANTS.split()
    return smallest(module_of, lambda name: (module_of[name], variant(name) if module_of[name] in variants else ""))


def build_timm(name: str) -> Built:
    import timm

    def calls(size: int) -> dict[str, Inputs]:
        return {"plain": {"x": draw(2, 3, size, size)}}

    patch = next((int(found[1]) for found in [re.search(r"patch(\d+)", name)] if found), 16)
    sizes = [patch * 4, 64, 128, 224, None]
    attempts = [{"img_size": size, **depth} for depth in ({"depth": 2}, {}) for size in sizes] + [{"depth": 2}, {}]
    reason = ""
    for options in attempts:
        options = {key: value for key, value in options.items() if value}
        try:
            with torch.device("meta"):
                check_size(timm.create_model(name, num_classes=10, **options))
            model = timm.create_model(name, num_classes=10, **options)
            for size in sorted({options.get("img_size", 64), model.default_cfg["input_size"][-1]}):
                try:
                    run(model.eval(), calls(size)["plain"])
                    return model, calls(size) | ({"right": naflex_call()} if name.startswith("naflexvit") else {})
                except (RuntimeError, AssertionError, ValueError, IndexError) as error:
                    reason = first_line(error)
        except (Refused, TimeoutError):
            raise
        except Exception as error:
            reason = first_line(error)
    raise Refused(reason)


def naflex_call() -> Inputs:
    """Two images of 16 patches, of which the second one has 8."""
    coordinates = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(2, -1, -1)
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[1, 8:] = False
    return {"x": draw(2, 16, 768), "patch_coord": coordinates, "patch_valid": valid}


def open_clip_names() -> list[str]:
    import open_clip

    return smallest(open_clip.list_models(), variant)


def build_open_clip(name: str) -> Built:
    import open_clip

    config = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "hf_model_name" in text:
        raise Refused("its text tower needs a download")
    custom = config.pop("custom_text", False) or "timm_model_name" in vision
    for part in (vision, text, config.get("multimodal_cfg", {})):
        if isinstance(part.get("layers"), int):
            part["layers"] = 2
    text["vocab_size"] = 1000
    if "multimodal_cfg" in config:
        config["multimodal_cfg"]["vocab_size"] = 1000
    kinds = {"coca": open_clip.CoCa}
    cls = kinds.get(name.split("_")[0], open_clip.CustomTextCLIP if custom else open_clip.CLIP)
    reason = ""
    full = vision["image_size"]
    for size in (vision.get("patch_size") or 16) * 4, 128, full:
        vision["image_size"] = size
        try:
            with torch.device("meta"):
                check_size(cls(**copy.deepcopy(config)))
            model = cls(**copy.deepcopy(config)).eval()
            tokens = torch.randint(1, 999, (2, text.get("context_length", 77)))
            tokens[0, 9:], tokens[1, 20:] = 0, 0
            tokens[0, 9], tokens[1, 20] = 999, 999  # CLIP pools the largest token
            calls = {"plain": {"image": draw(2, 3, size, size), "text": tokens}}
            run(model, calls["plain"])
            return model, calls
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            reason = first_line(error)
    raise Refused(reason)


SIZES = {
    300: "vocab_size text_vocab_size",
    128: "max_position_embeddings n_positions",
    96: "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim n_inner d_ff",
    64: "hidden_size d_model n_embd dim embed_dim hidden_dim word_embed_dim embedding_size projection_dim"
    " out_hidden_size mit_hidden_size",
    32: "image_size moe_intermediate_size shared_expert_intermediate_size",
    16: "head_dim d_kv max_source_positions rotary_dim",
    8: "patch_size",
    4: "num_attention_heads num_key_value_heads encoder_attention_heads decoder_attention_heads"
    " n_head n_heads num_heads num_experts num_local_experts n_routed_experts moe_num_experts",
    2: "num_hidden_layers encoder_layers decoder_layers n_layer num_layers n_layers depth"
    " num_experts_per_tok moe_topk moe_k",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
"""Fields of configurations, and the sizes that they get."""
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
SPECIAL_TOKENS |= {"image_token_id": 5, "image_token_index": 5, "video_token_id": 6, "audio_token_id": 7}
DROPOUT = re.compile(r".*(dropout|drop|drop_prob|drop_path_rate|layerdrop)$")


def transformers_names() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(MODEL_MAPPING_NAMES)


def shrink(cls: Any) -> Any:
    """A configuration of class `cls` with small sizes."""
    default = cls()
    values: dict[str, Any] = {}
    for name, value in vars(default).items():
        if hasattr(value, "to_diff_dict") and not name.startswith("_"):
            values[name] = shrink(type(value)).to_dict()
        elif name in SMALL and isinstance(value, int) and not isinstance(value, bool):
            values[name] = SMALL[name]
        elif name == "rope_parameters" and "mrope_section" in (value or {}):
            values[name] = value | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0}
        elif name in SPECIAL_TOKENS and value is not None:
            values[name] = SPECIAL_TOKENS[name]
        elif DROPOUT.fullmatch(name) and isinstance(value, float):
            values[name] = 0.0
    heads, groups = getattr(default, "num_attention_heads", None), getattr(default, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(groups, int) and groups < heads:
        values["num_key_value_heads"] = 2
    return cls(**values)


def build_transformers(name: str) -> Built:
    from transformers import CONFIG_MAPPING, AutoModel

    with excepted("configuration"):
        config = shrink(CONFIG_MAPPING[name])
    with excepted("construction"):
        with suppress(NotImplementedError, RuntimeError, TypeError), torch.device("meta"):
            check_size(AutoModel.from_config(copy.deepcopy(config)))
        try:
            model = AutoModel.from_config(copy.deepcopy(config), attn_implementation="sdpa")
        except (ValueError, ImportError):
            model = AutoModel.from_config(copy.deepcopy(config))
    calls = transformers_calls(name, model)
    with excepted("forward"):
        try:
            run(model.eval(), calls["plain"])
        except ValueError:  # of a model of videos
            for call in calls.values():
                call["pixel_values"] = call["pixel_values"][:, None].expand(-1, 8, -1, -1, -1).contiguous()
            run(model.eval(), calls["plain"])
    return model, calls


def transformers_calls(name: str, model: Any) -> dict[str, Inputs]:
    config = model.config
    parameters = inspect.signature(model.forward).parameters
    vision, text = getattr(config, "vision_config", config), getattr(config, "text_config", config)
    size, channels = getattr(vision, "image_size", 32), getattr(vision, "num_channels", None) or 3
    size = size[0] if isinstance(size, list | tuple) else size or 32
    images, tokens = draw(2, channels, size, size), torch.randint(10, getattr(text, "vocab_size", 300), (2, 12))
    call: Inputs = {"use_cache": False} if "use_cache" in parameters else {}
    has_tower = hasattr(config, "vision_config") and name in JOINT
    if name in ("idefics3", "smolvlm"):
        return {side: idefics_call(config, size, side) for side in ("plain", "right")}
    if name.startswith("siglip2"):
        return {side: siglip2_call(config, tokens, parameters, side) for side in ("plain", "right")}
    if "grid_thw" in parameters and "hidden_states" in parameters:
        patch = getattr(config, "temporal_patch_size", 1) * config.patch_size**2
        return {"plain": {"hidden_states": draw(48, 3 * patch), "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 8]])}}
    if "input_ids" in parameters:
        call["input_ids"] = tokens
    elif "input_features" in parameters:
        bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", 80)
        call["input_features"] = draw(2, bins, 2 * getattr(config, "max_source_positions", 16))
    elif "input_values" in parameters:
        call["input_values"] = draw(2, 4000)
    if "pixel_values" in parameters and ("input_ids" not in call or has_tower):
        call["pixel_values"] = images
    if "pixel_values_videos" in parameters and "input_ids" not in call:
        call["pixel_values_videos"] = images[:, None].expand(-1, 4, -1, -1, -1).contiguous()
    if "decoder_input_ids" in parameters:
        call["decoder_input_ids"] = tokens[:, :7]
    if "bbox" in parameters and "input_ids" in call:
        call["bbox"] = torch.zeros(2, 12, 4, dtype=torch.long)
    calls = {"plain": call}
    if "attention_mask" in parameters and "input_ids" in call:
        for side, hidden in (("right", slice(7, None)), ("left", slice(0, 5))):
            mask = torch.ones(2, 12, dtype=torch.long)
            mask[1, hidden] = 0
            calls[side] = call | {"attention_mask": mask}
    return calls


JOINT = {"aimv2", "align", "altclip", "blip", "blip-2", "bridgetower", "chinese_clip", "clip", "clipseg", "flava"}
JOINT |= {"groupvit", "instructblip", "metaclip_2", "owlv2", "owlvit", "siglip", "vilt", "xclip"}
"""Models whose forward needs images together with text."""


def idefics_call(config: Any, size: int, side: str) -> Inputs:
    """Two images of which the second one may be padded; text that is image tokens alone."""
    count = (size // config.vision_config.patch_size) ** 2 // config.scale_factor**2
    mask = torch.ones(2, 1, size, size, dtype=torch.bool)
    if side == "right":
        mask[1, :, :, size // 2 :] = False
    tokens = torch.full((2, count), config.image_token_id)
    return {
        "input_ids": tokens, "pixel_values": draw(2, 1, 3, size, size), "pixel_attention_mask": mask, "use_cache": False
    }  # fmt: skip


def siglip2_call(config: Any, tokens: Tensor, parameters: Any, side: str) -> Inputs:
    vision = getattr(config, "vision_config", config)
    mask, shapes = torch.ones(2, 16, dtype=torch.long), torch.tensor([[4, 4], [4, 4]])
    if side == "right":
        mask[1, 8:], shapes[1] = 0, torch.tensor([2, 4])
    patches = draw(2, 16, 3 * vision.patch_size**2)
    call = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return call | ({"input_ids": tokens} if "input_ids" in parameters else {})


LIBRARIES: dict[str, tuple[Callable[[], list[str]], Callable[[str], Built]]] = {
    "timm": (timm_names, build_timm),
    "open_clip": (open_clip_names, build_open_clip),
    "transformers": (transformers_names, build_transformers),
}
