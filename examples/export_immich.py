"""Write both towers of a CLIP for Immich's machine learning service.

python examples/export_immich.py EVA02-CLIP-B-16:merged2b_s8b_b131k EVA02-B-16__merged2b
"""

import argparse
from pathlib import Path
from typing import Any

from evaclip.atomic import write_json
from evaclip.errors import UserError
from evaclip.export import export
from evaclip.loading import load_model
from evaclip.model.clip import CLIP
from evaclip.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="NAME:WEIGHTS, a run, a checkpoint or hf-hub:OWNER/NAME")
    parser.add_argument("folder", type=Path, help="to make; files that it has are replaced")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32")
    args = parser.parse_args()
    model = load_model(args.model, random=False).model.eval()
    write(model, args.folder, args.dtype)


def write(model: CLIP, folder: Path, dtype: str = "fp32") -> None:
    """Write towers whose embeddings have length 1, preprocessing and tokenizer."""
    check(model)
    kind: dict[str, Any] = {"dtype": dtype, "normalize": True, "overwrite": True, "int32": True}
    for name in ("visual", "textual"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    export(model, "image", folder / "visual/model.onnx", names=("image", "embedding"), **kind)
    export(model, "text", folder / "textual/model.onnx", names=("text", "embedding"), **kind)
    Tokenizer(model.config.text.context_length, model.config.text.vocab_size).save_pretrained(folder / "textual")
    config, images = model.config, model.config.preprocess
    size = {"size": config.vision.image_size, "mode": "RGB", "mean": images.mean, "std": images.std}
    resize = {"interpolation": images.interpolation, "resize_mode": images.resize, "fill_color": 0}
    write_json(folder / "visual/preprocess_cfg.json", size | resize)
    vision, text = (
        {name: getattr(tower, name) for name in ("width", "heads", "layers")} for tower in (config.vision, config.text)
    )
    vision |= {"image_size": config.vision.image_size, "patch_size": config.vision.patch_size}
    text |= {"context_length": config.text.context_length, "vocab_size": config.text.vocab_size}
    write_json(folder / "config.json", {"embed_dim": config.embed_dim, "vision_cfg": vision, "text_cfg": text})


def check(model: CLIP) -> None:
    """Raise UserError if Immich can't do the model's preprocessing."""
    config = model.config
    if not isinstance(config.vision.image_size, int):
        raise UserError(f"the model's images must be square, got {config.vision.image_size}")
    if config.preprocess.crop != 1:
        raise UserError(f"preprocess.crop must be 1, got {config.preprocess.crop}")


if __name__ == "__main__":
    main()
