"""Run clip_benchmark with the models of this package, as its model type `evaclip`.

    python -m evaclip.eval.clip_benchmark eval --model runs/demo --pretrained '' --dataset wds/pets --dataset_root pets

has the options of `clip_benchmark`. A model is a run or checkpoint folder with an empty `--pretrained`, or the name of
a configuration with the file or tag of its weights.
"""

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from evaclip.errors import UserError
from evaclip.loading import load_model

MODEL_TYPE = "evaclip"


def load(model_name: str, pretrained: str, cache_dir: str | None, device: Any) -> tuple[Any, Any, Any]:
    """Load model, transform and tokenizer, with the signature of clip_benchmark's `load_clip`.

    Args:
        model_name: a run folder, a checkpoint folder, or a configuration's name.
        pretrained: file or tag of the weights; empty for a folder.
        cache_dir: not used; downloads are in the hub's cache.
        device: of the model.
    """
    loaded = load_model(f"{model_name}:{pretrained}" if pretrained else model_name, device=str(device))
    return loaded.model, loaded.transform, loaded.tokenizer


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """Share of rows of `output` [N, C] with the class `target` [N] among the first k, for each k."""
    best = output.topk(max(topk), dim=1).indices
    hits = best == target.unsqueeze(1)
    return [float(hits[:, :k].any(1).float().mean()) for k in topk]


def main(argv: Sequence[str] | None = None) -> None:
    """Run clip_benchmark with `argv`, or with the arguments of the process.

    Raises:
        UserError: clip_benchmark isn't installed.
    """
    try:
        from clip_benchmark import cli, models
        from clip_benchmark.metrics import zeroshot_classification
    except ImportError as exc:
        raise UserError(
            f"clip_benchmark can't be imported ({exc}); install it by: pip install clip-benchmark requests"
        ) from exc
    # Version 1.6.2 converts an array of one element to float, which NumPy refuses since 2.4.
    zeroshot_classification.accuracy = accuracy
    models.TYPE2FUNC[MODEL_TYPE] = load
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["eval"] and "--model_type" not in words:
        words += ["--model_type", MODEL_TYPE]
    sys.argv = ["clip_benchmark", *words]
    cli.main()


if __name__ == "__main__":
    main()
