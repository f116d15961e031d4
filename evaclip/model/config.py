"""Model configurations: frozen dataclasses, shipped JSON files, and memory options.

A configuration file holds only what differs from the defaults here, which are those of EVA02-CLIP (Sun et al.
2023, arXiv 2303.15389).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from evaclip.errors import UserError, unknown_name

Mlp = Literal["gelu", "gelu_tanh", "swiglu"]
TextMlp = Literal["gelu", "gelu_tanh"]
NormKind = Literal["layer_norm", "rms_norm"]
Interpolation = Literal["bicubic", "bilinear"]
Resize = Literal["shortest", "squash"]
Pool = Literal["token", "mean", "attention"]
HFPooler = Literal["mean_pooler", "max_pooler", "cls_pooler", "cls_last_hidden_state_pooler", "last_pooler"]
HFProjection = Literal["mlp", "linear"]
Recompute = Literal["none", "activations", "block"]

# Names of the same models in open_clip, in model cards, and on the hub.
ALIASES = {
    "EVA01-g-14": "EVA01-CLIP-g-14",
    "EVA01-g-14-plus": "EVA01-CLIP-g-14-plus",
    "EVA02-B-16": "EVA02-CLIP-B-16",
    "EVA02-L-14": "EVA02-CLIP-L-14",
    "EVA02-L-14-336": "EVA02-CLIP-L-14-336",
    "EVA02-E-14": "EVA02-CLIP-bigE-14",
    "EVA02-E-14-plus": "EVA02-CLIP-bigE-14-plus",
    "EVA-CLIP-8B-448": "EVA-CLIP-8B-plus",
    "BAAI/EVA-CLIP-8B": "EVA-CLIP-8B",
    "BAAI/EVA-CLIP-8B-448": "EVA-CLIP-8B-plus",
    "BAAI/EVA-CLIP-18B": "EVA-CLIP-18B",
    "google/siglip2-base-patch16-naflex": "SigLIP2-B-16-NaFlex",
    "google/siglip2-so400m-patch16-naflex": "SigLIP2-SO400M-16-NaFlex",
    "timm/eva_giant_patch14_clip_224.laion400m_s11b_b41k": "EVA01-CLIP-g-14",
    "timm/eva_giant_patch14_plus_clip_224.merged2b_s11b_b114k": "EVA01-CLIP-g-14-plus",
    "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k": "EVA02-CLIP-B-16",
    "timm/eva02_large_patch14_clip_224.merged2b_s4b_b131k": "EVA02-CLIP-L-14",
    "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k": "EVA02-CLIP-L-14-336",
    "timm/eva02_enormous_patch14_clip_224.laion2b_s4b_b115k": "EVA02-CLIP-bigE-14",
    "timm/eva02_enormous_patch14_plus_clip_224.laion2b_s9b_b144k": "EVA02-CLIP-bigE-14-plus",
}

_HUB = "hf-hub:"
_added: dict[str, Path] = {}
"""Files of `add_model_config` by model name."""
_RATE = "0 <= rate < 1", lambda value: 0 <= value < 1
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "crop": ("0 < share <= 1", lambda value: 0 < value <= 1),
    "drop_path": _RATE,
    "patch_dropout": _RATE,
    "prefix_tokens": ("0 to 16", lambda value: 0 <= value <= 16),
    "init_logit_bias": ("a number, or null", math.isfinite),
}
"""Accepted numbers by field; all others are positive."""

Config = TypeVar("Config")


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing of images; stored next to the weights.

    Attributes:
        mean, std: per RGB channel, on the scale 0..1.
        interpolation: interpolation when images are resized.
        resize: resizing in evaluation: shortest side and centre crop, or squash.
        crop: share of the side that the centre crop keeps.
        max_patches: evaluation keeps each image's aspect ratio, in at most so many patches, and ignores `resize` and
            `crop`; None for images of the model's size.
    """

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Interpolation = "bicubic"
    resize: Resize = "shortest"
    crop: float = 1.0
    max_patches: int | None = None

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            try:  # those of a command line are strings
                numbers = tuple(map(float, values))
            except (TypeError, ValueError):
                numbers = ()
            _check(
                len(numbers) == 3 and all(map(math.isfinite, numbers)),
                f"preprocess.{name} must be 3 numbers, one per RGB channel, got {values!r}",
            )
            object.__setattr__(self, name, numbers)
        _check(min(self.std) > 0, f"preprocess.std must be positive, got {self.std}")
        _check_fields("preprocess", self)


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Sizes in pixels, `width` and `hidden` in channels.

    Attributes:
        image_size: side of a square image, or height and width.
        mlp_ratio: hidden width of the MLP is `int(width * mlp_ratio)`.
        sub_norm: a norm before the output projection of attention and of the SwiGLU MLP; q, k and v are then
            three matrices, otherwise one.
        attn_sub_norm: false for `sub_norm` without the norm in attention, as in EVA-02 before CLIP training.
        post_norm: norm of the output of a sub-layer, inside the residual branch, instead of its input.
        rope: rotary position embedding on the patches, in addition to the learned absolute one.
        pt_hw_seq_len: grid side to which the rotary positions of every grid are scaled.
        qkv_bias: biases on q and v (never on k) and on the final projection.
        layer_scale_init: start value of the learned factor per channel of each residual branch; None for no
            factor.
        drop_path: rate of stochastic depth in the last block, rising linearly from 0 in the first.
        patch_dropout: share of the patches that training drops (FLIP, Li et al. 2022).
        pool: input of the head: the class token, the mean of the patches, or the output of an attention pooling layer,
            which in a CLIP is the embedding.
        prefix_tokens: learned tokens in front of the patches, 0 to 16: the class token, which `token` pools, then
            registers (Darcet et al. 2024, arXiv 2309.16588).
        pos_interpolation, pos_antialias: how the position embedding is resized to images of another size.
        pos_square: resize it to a square of the image's longer side and crop it: patches keep their aspect ratio.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 2.6667
    mlp: Mlp = "swiglu"
    norm: NormKind = "layer_norm"
    norm_eps: float = 1e-6
    sub_norm: bool = True
    attn_sub_norm: bool = True
    post_norm: bool = False
    rope: bool = True
    rope_theta: float = 10000.0
    pt_hw_seq_len: int = 16
    qkv_bias: bool = True
    layer_scale_init: float | None = None
    drop_path: float = 0.0
    patch_dropout: float = 0.0
    pool: Pool = "token"
    prefix_tokens: int = 1
    pos_interpolation: Interpolation = "bicubic"
    pos_antialias: bool = False
    pos_square: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.image_size, list | tuple):
            object.__setattr__(self, "image_size", _pair(self.image_size))
        _check_fields("vision", self)
        _check(
            self.pool != "token" or self.prefix_tokens > 0,
            "vision.prefix_tokens must be 1 or more with pool=token, got 0",
        )
        _check(
            self.pool != "attention" or self.mlp != "swiglu",
            "vision.mlp must be gelu or gelu_tanh with pool=attention, got swiglu",
        )
        _check_heads("vision", self.width, self.heads)
        _check(
            all(side % self.patch_size == 0 for side in self.image_shape),
            f"vision.image_size {self.image_size} isn't a multiple of patch_size {self.patch_size}",
        )
        _check(
            not self.rope or self.head_dim % 4 == 0,
            f"vision.width / vision.heads must be a multiple of 4 with rope, got {self.head_dim}",
        )
        _check(
            not self.sub_norm or (self.mlp == "swiglu" and self.norm == "layer_norm"),
            f"vision.sub_norm needs mlp=swiglu and norm=layer_norm, got {self.mlp} and {self.norm}",
        )

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches in an image, without prefix tokens."""
        rows, columns = self.grid
        return rows * columns

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Hidden channels of the MLP."""
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True)
class TextConfig:
    """The text tower: a pre-norm transformer (CLIP, Radford et al. 2021). Lengths in tokens.

    With `hf_model_name` it is an encoder of transformers with a pooler and a projection, under open_clip's options.
    `vocab_size`, `width`, `layers`, `heads` and `mlp_ratio` are then those of the encoder.

    Attributes:
        causal: tokens see earlier ones only, and the end token is pooled. False: they see all, padding too, and the
            last position is pooled (SigLIP, Zhai et al. 2023, arXiv 2303.15343).
        proj_bias: a bias on the projection.
        hf_model_name: folder, or name on the Hugging Face hub, of the encoder, such as `xlm-roberta-base`.
        hf_tokenizer_name: folder or name of the tokenizer; None for the tokenizer of `hf_model_name`, or CLIP's.
        hf_folder: folder with copies of the encoder's config.json and the tokenizer, which are read in place of those
            of the two names, such as in a checkpoint.
        hf_model_pretrained: start from the weights of `hf_model_name`, where no weights of the whole model are given.
        hf_pooler_type: mean or maximum over tokens, the first token (`cls_pooler`: after the encoder's own pooling
            layer), or the last token.
        hf_proj_type: one matrix, or two with GELU between them; None for no projection.
    """

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-5
    mlp: TextMlp = "gelu"
    causal: bool = True
    proj_bias: bool = False
    hf_model_name: str | None = None
    hf_tokenizer_name: str | None = None
    hf_folder: str | None = None
    hf_model_pretrained: bool = True
    hf_pooler_type: HFPooler = "mean_pooler"
    hf_proj_type: HFProjection | None = "mlp"

    def __post_init__(self) -> None:
        _check_fields("text", self)
        _check_heads("text", self.width, self.heads)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Hidden channels of the MLP."""
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers, the width of their embeddings, and the preprocessing of images.

    Attributes:
        init_logit_scale: start value of the logarithm of the factor of the similarities.
        init_logit_bias: start value of the bias of a model for SigLIP's loss (Zhai et al. 2023, arXiv 2303.15343), as
            in open_clip's configurations; None for a model without one.
    """

    embed_dim: int = 512
    init_logit_scale: float = math.log(1 / 0.07)
    init_logit_bias: float | None = None
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    preprocess: Preprocess = field(default_factory=Preprocess)

    def __post_init__(self) -> None:
        _check_fields("model", self)
        width = self.vision.width
        _check(
            self.vision.pool != "attention" or self.embed_dim == width,
            f"embed_dim must be vision.width {width} with vision.pool=attention, got {self.embed_dim}",
        )

    @property
    def image_projection(self) -> int:
        """Outputs of the image tower's projection; 0 for none, as an attention pooling layer gives the embedding."""
        return 0 if self.vision.pool == "attention" else self.embed_dim

    def to_dict(self) -> dict[str, Any]:
        """All options as plain data; `override(CLIPConfig(), ...)` is the inverse."""
        return asdict(self)


def override(config: Config, changes: Mapping[str, Any], path: str = "") -> Config:
    """A copy of a dataclass with some fields changed; a mapping changes fields of a nested dataclass.

    Args:
        config: a frozen dataclass.
        changes: new values by field name, such as `{"embed_dim": 256, "vision": {"layers": 2}}`.
        path: prefix of the option names in error messages.

    Raises:
        UserError: for a field that doesn't exist or a value that isn't accepted.
    """
    names = [f.name for f in fields(config)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in changes.items():
        if name not in names:
            raise unknown_name("model option", path + name, [path + k for k in names])
        current = getattr(config, name)
        if is_dataclass(current) and isinstance(value, Mapping):
            value = override(current, value, f"{path}{name}.")
        elif (is_dataclass(current) or is_dataclass(value)) and not isinstance(value, type(current)):
            raise UserError(f"model option {path}{name} must be {_kind(current)}, got {value!r}")
        values[name] = value
    return replace(config, **values)  # type: ignore[type-var]


def list_models() -> list[str]:
    """Names of the shipped configurations and of configurations that `add_model_config` added.

    Example:
        `"EVA02-CLIP-L-14" in evaclip.list_models()`
    """
    return sorted([*_shipped(), *_added])


def add_model_config(path: str | Path) -> None:
    """Add your own configurations under the names of their files, in this process.

    Args:
        path: a JSON file with the differences from `CLIPConfig()`, such as `{"vision": {"layers": 6}}`, or a folder of
            such files.

    Raises:
        UserError: for another file, or one with the name of a shipped configuration.

    Example:
        `evaclip.add_model_config("my-small-clip.json"); evaclip.create_model("my-small-clip")`
    """
    path = Path(path)
    files_added = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files_added:
        raise UserError(f"the folder {str(path)!r} has no .json file")
    for file in files_added:
        if find_model(file.stem) in _shipped():  # an alias, or another spelling, would never be found
            raise UserError(f"{str(file)!r} has the name of a shipped model; give it another name")
        _read_config(file)
    _added.update({file.stem: file for file in files_added})
    get_config.cache_clear()


def find_model(name: str) -> str | None:
    """Name of a configuration from any spelling; None if there is none.

    Case, `_` or `/` instead of `-`, and the prefix `hf-hub:` of a name on the hub don't matter.
    """
    spellings = {_spelling(model): model for model in list_models()}
    spellings |= {_spelling(alias): model for alias, model in ALIASES.items()}
    return spellings.get(_spelling(name))


@cache
def get_config(name: str) -> CLIPConfig:
    """The configuration called `name`, in any spelling of `find_model`, names of open_clip included.

    Raises:
        UserError: for an unknown name, with the nearest known ones.

    Example:
        `evaclip.get_config("EVA02-B-16").vision.image_size` is 224.
    """
    stem = find_model(name)
    if stem is None:
        raise unknown_name("model", name, [*list_models(), *ALIASES])
    if stem in _added:
        return _read_config(_added[stem])
    text = (files("evaclip") / "configs" / f"{stem}.json").read_text(encoding="utf-8")
    return override(CLIPConfig(), json.loads(text))


@cache
def _shipped() -> tuple[str, ...]:
    folder = files("evaclip") / "configs"
    return tuple(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def _spelling(name: str) -> str:
    return name.removeprefix(_HUB).lower().replace("_", "-").replace("/", "-")


def _read_config(file: Path) -> CLIPConfig:
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(options, dict):
            raise ValueError(f"expected an object with options, got a {type(options).__name__}")
        return override(CLIPConfig(), options)
    except (OSError, ValueError, UserError) as exc:
        raise UserError(f"{str(file)!r} is not a model configuration: {exc}") from exc


def _pair(sizes: Sequence[Any]) -> tuple[int, int]:
    good = len(sizes) == 2 and all(isinstance(size, int) and size > 0 for size in sizes)
    _check(good, f"vision.image_size must be a positive integer, or height and width, got {sizes!r}")
    height, width = sizes
    return height, width


def _kind(value: Any) -> str:
    return "a mapping of its options" if is_dataclass(value) else f"a value such as {value!r}"


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_fields(part: str, config: Any) -> None:
    """Check each field by its annotation, and numbers by `_NUMBERS`."""
    for entry in fields(config):
        name, value = f"{part}.{entry.name}", getattr(config, entry.name)
        is_union = get_origin(entry.type) in (Union, UnionType)
        kind, *others = get_args(entry.type) if is_union else (entry.type,)
        if is_dataclass(kind) or get_origin(kind) is tuple or type(value) in [get_origin(x) or x for x in others]:
            continue
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise unknown_name(name, str(value), get_args(kind))
        elif kind is bool:
            _check(isinstance(value, bool), f"{name} must be true or false, got {value!r}")
        elif kind is str:
            _check(isinstance(value, str), f"{name} must be a folder, a name on the hub, or null, got {value!r}")
        else:
            numbers = "a positive integer" if kind is int else "a positive number"
            expected, is_accepted = _NUMBERS.get(entry.name, (numbers, lambda number: number > 0))
            is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
            _check(
                is_number and math.isfinite(value) and is_accepted(value), f"{name} must be {expected}, got {value!r}"
            )


def _check_heads(part: str, width: int, heads: int) -> None:
    _check(width % heads == 0, f"{part}.width must be a multiple of heads {heads}, got {width}")


@dataclass(frozen=True)
class Savings:
    """Options that save work and memory. Embeddings and gradients stay equal up to rounding; see docs/scale.md.

    Attributes:
        pack_text: run the text tower without padding. In a graph of `torch.compile` it needs
            `torch._dynamo.config.capture_dynamic_output_shape_ops = True`, before the graph is compiled; texts are
            padded otherwise, see `cut_padding`.
        pooled_last_block: compute the last block of each tower only for the pooled token.
        early_drop: embed only the patches that token dropout keeps.
        recompute: activation checkpointing in training: none; of norms, activation functions and the query-key-value
            projections; or of whole blocks.
    """

    pack_text: bool = True
    pooled_last_block: bool = True
    early_drop: bool = True
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        _check_fields("savings", self)
