"""Folders that transformers loads: `AutoModel.from_pretrained(FOLDER, trust_remote_code=True)`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaclip.atomic import write_json, write_text, writing
from evaclip.errors import UserError
from evaclip.model.clip import CLIP
from evaclip.model.config import CLIPConfig
from evaclip.outputs import check_output
from evaclip.tokenizer import Tokenizer
from evaclip.weights.files import save_tensors
from evaclip.weights.publish import CARD_FILE, card_text

_PILLOW = {"bilinear": 2, "bicubic": 3}
_CODE, _IMAGES = (Path(__file__).with_name(f"{name}_evaclip.py") for name in ("modeling", "image_processing"))
_WEIGHTS = "model.safetensors"
_CONFIGS = "config.json", "preprocessor_config.json"
_USAGE = """\
```python
from transformers import AutoModel, AutoProcessor  # pip install 'evakernels[hf]'

model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
```
"""


def save_for_transformers(
    model: CLIP, folder: Path, *, facts: Mapping[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Write weights, code, configuration, processor and model card.

    Args:
        model: with a text tower of CLIP and square images.
        folder: made if it doesn't exist.
        facts: parts of the card, as `run_facts` returns them.
        overwrite: replace existing files.

    Raises:
        UserError: for another model, or files that may not be written.
    """
    for name in ("hf_model_name", "hf_tokenizer_name"):
        if (value := getattr(model.config.text, name)) is not None:
            raise UserError(f"text.{name} must be None, got {value!r}")
    if not model.config.text.causal:
        raise UserError("text.causal must be True, got False")
    check_preprocess(model.config)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name in (_WEIGHTS, *_CONFIGS, _CODE.name, _IMAGES.name, CARD_FILE):
        check_output(folder / name, overwrite=overwrite)
    save_tensors({f"clip.{name}": tensor for name, tensor in model.state_dict().items()}, folder / _WEIGHTS)
    for name, content in zip(_CONFIGS, (_config(model), image_processor(model.config)), strict=True):
        write_json(folder / name, content)
    Tokenizer(model.config.text.context_length, model.config.text.vocab_size).save_pretrained(folder)
    for code in (_CODE, _IMAGES):
        write_text(folder / code.name, code.read_text(encoding="utf-8"))
    parts = {"library_name": "transformers", "usage": _USAGE.format(name=folder.name), **(facts or {})}
    write_text(folder / CARD_FILE, card_text(parts, folder.name))


def _config(model: CLIP) -> dict[str, Any]:
    code = _CODE.stem
    return {
        "model_type": "evaclip",
        "architectures": ["EVACLIPModel"],
        "auto_map": {
            "AutoConfig": f"{code}.EVACLIPConfig",
            "AutoModel": f"{code}.EVACLIPModel",
            "AutoModelForZeroShotImageClassification": f"{code}.EVACLIPModel",
        },
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "clip": model.config.to_dict(),
    }


def image_processor(config: CLIPConfig) -> dict[str, Any]:
    """Contents of preprocessor_config.json, for a `CLIPProcessor`."""
    side, images = config.vision.image_size, config.preprocess
    cut = images.resize == "shortest"
    return {
        "processor_class": "CLIPProcessor",
        "image_processor_type": "CLIPImageProcessor",
        "auto_map": {"AutoImageProcessor": f"{_IMAGES.stem}.EVACLIPImageProcessor"},
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


def check_preprocess(config: CLIPConfig) -> None:
    """Raises `UserError` if a `CLIPImageProcessor` can't do the model's preprocessing."""
    if not isinstance(config.vision.image_size, int):
        raise UserError(f"the model's images must be square, got {config.vision.image_size}")
    if config.preprocess.crop != 1:
        raise UserError(f"preprocess.crop must be 1, got {config.preprocess.crop}")
    if config.preprocess.max_patches is not None:
        raise UserError(f"preprocess.max_patches must be None, got {config.preprocess.max_patches}")
