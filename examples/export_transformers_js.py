"""Write both towers of a CLIP for transformers.js, with the files of a Hugging Face repository.

python examples/export_transformers_js.py EVA02-CLIP-B-16:merged2b_s8b_b131k EVA02-B-16 --dtype fp16
"""

import argparse
from pathlib import Path
from typing import Any

from evaclip.atomic import write_json
from evaclip.export import export
from evaclip.loading import load_model
from evaclip.model.clip import CLIP
from evaclip.model.config import CLIPConfig
from evaclip.tokenizer import Tokenizer
from evaclip.weights.for_transformers import check_preprocess, image_processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="NAME:WEIGHTS, a run, a checkpoint or hf-hub:OWNER/NAME")
    parser.add_argument("folder", type=Path, help="to make; files that it has are replaced")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32")
    args = parser.parse_args()
    model = load_model(args.model, random=False).model.eval()
    write(model, args.folder, args.dtype)


def write(model: CLIP, folder: Path, dtype: str = "fp32") -> None:
    """Write towers whose embeddings have length 1, configuration, preprocessing and tokenizer."""
    check_preprocess(model.config)
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    # transformers.js finds weights of another kind by the end of the file's name.
    suffix = "" if dtype == "fp32" else f"_{dtype}"
    kind: dict[str, Any] = {"dtype": dtype, "normalize": True, "overwrite": True}
    image, text = (folder / "onnx" / f"{name}_model{suffix}.onnx" for name in ("vision", "text"))
    export(model, "image", image, names=("pixel_values", "image_embeds"), **kind)
    export(model, "text", text, names=("input_ids", "text_embeds"), **kind)
    Tokenizer(model.config.text.context_length, model.config.text.vocab_size).save_pretrained(folder)
    write_json(folder / "config.json", model_config(model.config))
    write_json(folder / "preprocessor_config.json", image_processor(model.config))


def model_config(config: CLIPConfig) -> dict[str, Any]:
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


if __name__ == "__main__":
    main()
