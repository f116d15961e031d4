"""clip_benchmark's command line with the models of this package, as its model type `evaclip`.

    python -m evaclip.eval.clip_benchmark eval --model runs/demo --pretrained '' --dataset wds/pets --dataset_root pets

takes what `clip_benchmark` takes. A model is a run or checkpoint folder with an empty `--pretrained`, or the name of a
configuration with the file or tag of its weights.
"""

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from evaclip.errors import UserError
from evaclip.loading import load_model

MODEL_TYPE = "evaclip"


def load(model_name: str, pretrained: str, cache_dir: str | None, device: Any) -> tuple[Any, Any, Any]:
    """Model, transform and tokenizer, as clip_benchmark's `load_clip` returns them.

    Args:
        model_name: a run folder, a checkpoint folder, or a configuration's name.
        pretrained: the file or tag of the weights; empty for a folder.
        cache_dir: not used; downloads are in the hub's own cache.
        device: where the model runs.
    """
    loaded = load_model(f"{model_name}:{pretrained}" if pretrained else model_name, device=str(device))
    return loaded.model, loaded.transform, loaded.tokenizer


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """For each k the share of rows of `output` [N, C] in which the class `target` [N] is among the first k."""
    best = output.topk(max(topk), dim=1).indices
    hits = best == target.unsqueeze(1)
    return [float(hits[:, :k].any(1).float().mean()) for k in topk]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs clip_benchmark with `argv`, or with the arguments of the process.

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
    # Version 1.6.2 takes the float of an array with one element, which NumPy refuses since 2.4.
    zeroshot_classification.accuracy = accuracy
    models.TYPE2FUNC[MODEL_TYPE] = load
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["eval"] and "--model_type" not in given:
        given += ["--model_type", MODEL_TYPE]
    sys.argv = ["clip_benchmark", *given]
    cli.main()


if __name__ == "__main__":
    main()
