"""Both towers in a folder as Immich and transformers.js expect it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors

from evaclip.atomic import require_writable, write_json, write_text, writing
from evaclip.errors import UserError
from evaclip.model.clip import CLIP
from evaclip.model.config import CLIPConfig
from evaclip.outputs import check_output
from evaclip.portable.check import Outcome
from evaclip.portable.files import Spec, write_checked
from evaclip.tokenizer import END, START, byte_pair_encoder
from evaclip.weights.card import CARD_FILE, card_text

Layout = Literal["immich", "transformers.js"]
LAYOUTS: tuple[Layout, ...] = ("immich", "transformers.js")

_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_PILLOW = {"bilinear": 2, "bicubic": 3}
# transformers.js finds weights of another kind by the end of the file's name.
_SUFFIXES = {"fp32": "", "fp16": "_fp16", "bf16": "_bf16", "int8": "_int8"}

_CARDS: dict[Layout, dict[str, Any]] = {
    "immich": {
        "tags": ["clip", "onnx", "immich"],
        "usage": "In the model folder of Immich's machine learning service.",
    },
    "transformers.js": {
        "library_name": "transformers.js",
        "tags": ["clip", "onnx"],
        "usage": "By CLIPVisionModelWithProjection and CLIPTextModelWithProjection.",
    },
}

# Of each half: the name of its file or folder, of what goes in, and of what comes out.
_Halves = tuple[tuple[Literal["image", "text"], str, str, str], ...]
_IMMICH: _Halves = (("image", "visual", "image", "embedding"), ("text", "textual", "text", "embedding"))
_TRANSFORMERS_JS: _Halves = (
    ("image", "vision_model", "pixel_values", "image_embeds"),
    ("text", "text_model", "input_ids", "text_embeds"),
)


def check_folder(target: Path, config: CLIPConfig) -> None:
    """Raises UserError for a folder that `export_folder` doesn't write, or a model that has no place in the layouts."""
    if target.exists():
        raise UserError(f"{str(target)!r} exists; give a folder that isn't there yet")
    check_output(target, overwrite=False)
    if not isinstance(config.vision.image_size, int):
        raise UserError(f"the model's images are {config.vision.image_size}; this layout has square ones only")
    if config.preprocess.crop != 1:
        raise UserError(f"the model's preprocess.crop is {config.preprocess.crop}; this layout always has 1")


def export_folder(
    model: CLIP,
    target: Path,
    layout: Layout,
    *,
    dtype: str = "fp32",
    int8: bool = False,
    model_card: Mapping[str, Any] | None = None,
) -> dict[str, list[Outcome]]:
    """Writes both towers, with tokenizer and preprocessing, for another program to load; embeddings have length 1.

    Args:
        model: in evaluation mode.
        target: a folder that isn't there yet; appears complete or not at all.
        layout: `immich` for its machine learning service, or `transformers.js` for the classes
            CLIPVisionModelWithProjection and CLIPTextModelWithProjection.
        dtype, int8: as for `export`.
        model_card: parts of the card, as for `evaclip.save_for_hf`.

    Returns:
        What each engine made of each tower, by the file's place in the folder.

    Raises:
        Refused: an engine doesn't give the model's embeddings.
        UserError: for a target that may not be written, or a model that the layout has no place for.

    Example:
        `export_folder(model, Path("clip/EVA02-B-16"), "immich")`
    """
    check_folder(target, model.config)
    write = _write_immich if layout == "immich" else _write_transformers_js
    card = card_text({**_CARDS[layout], **(model_card or {})}, target.name)
    with writing(target), _folder(target) as folder:
        write_text(folder / CARD_FILE, card)
        return write(model, folder, dtype, int8)


def tokenizer_file(config: CLIPConfig) -> Tokenizer:
    """The model's tokenizer with all its steps inside, as `tokenizers` keeps them in a tokenizer.json.

    It cuts words by the Unicode of its runtime, and neither repairs mis-encoded characters nor resolves HTML entities:
    for all other text the ids are those of `evaclip.get_tokenizer`, but for the padding, which is the end token; the
    model doesn't see it.
    """
    vocab_size = config.text.vocab_size
    tokenizer = Tokenizer.from_str(byte_pair_encoder(vocab_size).to_str())
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_WORD), "removed", invert=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    ends = [(START, vocab_size - 2), (END, vocab_size - 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
    tokenizer.enable_truncation(config.text.context_length)
    tokenizer.enable_padding(length=config.text.context_length, pad_id=vocab_size - 1, pad_token=END)
    return tokenizer


def _write_immich(model: CLIP, folder: Path, dtype: str, int8: bool) -> dict[str, list[Outcome]]:
    config = model.config
    outcomes: dict[str, list[Outcome]] = {}
    for tower, name, entry, result in _IMMICH:
        (folder / name).mkdir()
        spec = Spec(tower, True, dtype, int8, entry, result, int32=True)
        outcomes[f"{name}/model.onnx"] = write_checked(model, spec, folder / name / "model.onnx")
    _write_tokenizer(config, folder / "textual")
    images = config.preprocess
    preprocess = {"size": config.vision.image_size, "mode": "RGB", "mean": images.mean, "std": images.std}
    preprocess |= {"interpolation": images.interpolation, "resize_mode": images.resize, "fill_color": 0}
    write_json(folder / "visual/preprocess_cfg.json", preprocess)
    vision = {"image_size": config.vision.image_size, "patch_size": config.vision.patch_size}
    text = {"context_length": config.text.context_length, "vocab_size": config.text.vocab_size}
    sizes = {"vision_cfg": _sizes(config.vision) | vision, "text_cfg": _sizes(config.text) | text}
    write_json(folder / "config.json", {"embed_dim": config.embed_dim, **sizes})
    return outcomes


def _write_transformers_js(model: CLIP, folder: Path, dtype: str, int8: bool) -> dict[str, list[Outcome]]:
    config = model.config
    outcomes: dict[str, list[Outcome]] = {}
    (folder / "onnx").mkdir()
    suffix = _SUFFIXES["int8" if int8 else dtype]
    for tower, name, entry, result in _TRANSFORMERS_JS:
        path = folder / "onnx" / f"{name}{suffix}.onnx"
        outcomes[f"onnx/{path.name}"] = write_checked(model, Spec(tower, True, dtype, int8, entry, result), path)
    _write_tokenizer(config, folder)
    write_json(folder / "config.json", _transformers_config(config))
    write_json(folder / "preprocessor_config.json", _transformers_preprocess(config))
    return outcomes


def _transformers_config(config: CLIPConfig) -> dict[str, Any]:
    vision, text = config.vision, config.text
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": config.embed_dim,
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "projection_dim": config.embed_dim,
        },
        "text_config": {
            "model_type": "clip_text_model",
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "projection_dim": config.embed_dim,
            "bos_token_id": text.vocab_size - 2,
            "eos_token_id": text.vocab_size - 1,
            "pad_token_id": text.vocab_size - 1,
        },
    }


def _transformers_preprocess(config: CLIPConfig) -> dict[str, Any]:
    side, images = config.vision.image_size, config.preprocess
    cut = images.resize == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side} if cut else {"height": side, "width": side},
        "resample": _PILLOW[images.interpolation],
        "do_center_crop": cut,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": images.mean,
        "image_std": images.std,
    }


def _sizes(tower: Any) -> dict[str, int]:
    return {name: getattr(tower, name) for name in ("width", "heads", "layers")}


def _write_tokenizer(config: CLIPConfig, folder: Path) -> None:
    tokenizer_file(config).save(str(folder / "tokenizer.json"))
    names = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    kind = {"tokenizer_class": "CLIPTokenizer", "model_max_length": config.text.context_length, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", {**kind, **names})
    write_json(folder / "special_tokens_map.json", names)


@contextmanager
def _folder(target: Path) -> Iterator[Path]:
    """A folder that gets the name of `target` if the block succeeds."""
    require_writable(target, make_folder=False)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as outer:
        inner = Path(outer) / target.name
        inner.mkdir()
        yield inner
        inner.rename(target)
