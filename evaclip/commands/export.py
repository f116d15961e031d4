"""`evaclip export`: the towers of a model as programs that run without it, for torch and for ONNX runtimes."""

import argparse
from pathlib import Path
from typing import Any, Literal

from evaclip.commands.parser import leaf
from evaclip.errors import UserError

_EXAMPLES = (
    "evaclip export EVA02-CLIP-B-16:merged2b_s8b_b131k image.onnx --tower image",
    "evaclip export runs/demo text.pt2 --tower text",
    "evaclip export runs/finetuned classifier.onnx",
)
_DTYPES = ("fp32", "fp16", "bf16")


def add_commands(subparsers: Any) -> None:
    """Add `export` to the command line."""
    help = (
        "write a tower of a model, or a classifier, as a program of torch.export or ONNX (opset 20), for any batch "
        "size; an ONNX file is written only if ONNX Runtime reproduces the model's outputs"
    )
    parser = leaf(subparsers, "export", _run, help=help, examples=_EXAMPLES)
    add = parser.add_argument
    model_help = "NAME:WEIGHTS, a run, a checkpoint, hf-hub:OWNER/NAME, as for 'evaclip eval'"
    add("model", metavar="MODEL", help=model_help)
    add("target", metavar="OUT", type=Path, help="file to write: .pt2 (torch.export), .onnx")
    add("--tower", choices=("image", "text"), help="tower of a CLIP; a classifier has one")
    add("--random", action="store_true", help="MODEL is a NAME with random weights")
    add("--dtype", choices=_DTYPES, default="fp32", help="of ONNX weights (default: %(default)s)")
    add("--no-average", action="store_true", help="a run's raw weights, not their moving average")
    add("--normalize", action="store_true", help="divide the embeddings by their L2 norm")
    help = "a .pt2 takes packed images of any size with at most N patches each (default: one size)"
    add("--max-patches", type=int, metavar="N", help=help)
    add("--force", action="store_true", help="replace OUT if it is a file that exists")


def _run(args: argparse.Namespace) -> None:
    # Imported here so that `evaclip --help` doesn't wait for torch.
    from evaclip.atomic import write_text
    from evaclip.export import check_target, export
    from evaclip.loading import RANDOM, load_features
    from evaclip.model.vision_model import VisionModel
    from evaclip.weights.publish import prepare_card

    check_target(args.target, args.force, args.dtype)  # before the weights are fetched
    card = prepare_card(args.target, args.model, overwrite=args.force, average=not args.no_average)
    loaded = load_features(args.model, average=not args.no_average)
    if (loaded.origin == RANDOM) != args.random:
        raise UserError(
            f"--random is for a NAME without weights, got {args.model!r}"
            if args.random
            else f"{args.model!r} has random weights; give NAME:WEIGHTS, a run, or --random to try the program"
        )
    if args.tower is None and not isinstance(loaded.model, VisionModel):
        raise UserError(f"--tower must be image or text for the CLIP {args.model!r}")
    tower: Literal["image", "text"] = args.tower or "image"
    kind = {"normalize": args.normalize, "overwrite": args.force, "dtype": args.dtype}
    export(loaded.model.eval(), tower, args.target, max_patches=args.max_patches, **kind)
    if card:
        write_text(*card)
    print(f"wrote {args.target}" + (", with random weights" if args.random else ""))
