"""`evaclip export`: the towers of a model as programs that run without it, for torch and for ONNX runtimes."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evaclip.commands.parser import leaf
from evaclip.errors import UserError

if TYPE_CHECKING:
    from evaclip.onnx_check import Outcome

_EXAMPLES = (
    "evaclip export EVA02-CLIP-B-16:merged2b_s8b_b131k image.onnx --tower image",
    "evaclip export runs/demo text.pt2 --tower text",
    "evaclip export runs/finetuned classifier.onnx",
    "evaclip export --check image.onnx --provider CPUExecutionProvider",
)
_DTYPES = ("fp32", "fp16", "bf16")


def add_commands(subparsers: Any) -> None:
    """Add `export` to the command line."""
    help = (
        "write a tower of a model, or a classifier, as a program of torch.export or ONNX (opset 20), for any batch "
        "size; an ONNX file is written only if ONNX Runtime reproduces the model's outputs"
    )
    parser = leaf(subparsers, "export", _run, help=help, examples=_EXAMPLES)
    parser.is_intermixed = True
    add, what, kinds = parser.add_argument, *(parser.add_mutually_exclusive_group() for _ in range(2))
    model_help = "NAME:WEIGHTS, a run, a checkpoint, hf-hub:OWNER/NAME, as for 'evaclip eval'"
    add("model", metavar="MODEL", nargs="?", help=model_help)
    add("target", metavar="OUT", nargs="?", type=Path, help="file to write: .pt2 (torch.export), .onnx")
    what.add_argument("--tower", choices=("image", "text"), help="tower of a CLIP; a classifier has one")
    what.add_argument("--check", metavar="FILE", type=Path, help="run the probe that an exported ONNX file holds")
    add("--random", action="store_true", help="MODEL is a NAME with random weights")
    kinds.add_argument("--dtype", choices=_DTYPES, default="fp32", help="of ONNX weights (default: %(default)s)")
    kinds.add_argument("--int8", action="store_true", help="ONNX with matmuls of 8-bit integers")
    add("--no-average", action="store_true", help="a run's raw weights, not their moving average")
    add("--normalize", action="store_true", help="divide the embeddings by their L2 norm")
    help = "a .pt2 takes packed images of any size with at most so many patches each (default: one size)"
    add("--max-patches", type=int, metavar="N", help=help)
    add("--force", action="store_true", help="replace OUT if it is a file that exists")
    add("--provider", nargs="+", help="execution providers of ONNX Runtime for --check (default: CPU)")


def _run(args: argparse.Namespace) -> None:
    if args.check:
        return _check(args)
    if args.model is None or args.target is None:
        raise UserError("MODEL and OUT aren't both given; expected `evaclip export MODEL OUT ...`")
    if args.provider:
        raise UserError("--provider is for --check FILE")
    # Imported here so that `evaclip --help` doesn't wait for torch.
    from evaclip.atomic import write_text
    from evaclip.export import check_target, export
    from evaclip.loading import RANDOM, load_features
    from evaclip.model.vision_model import VisionModel
    from evaclip.weights.publish import prepare_card

    check_target(args.target, args.force, args.dtype, args.int8)  # before the weights are fetched
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
    kind = {"normalize": args.normalize, "overwrite": args.force, "dtype": args.dtype, "int8": args.int8}
    _show(args.target, export(loaded.model.eval(), tower, args.target, max_patches=args.max_patches, **kind))
    if card:
        write_text(*card)
    print(f"wrote {args.target}" + (", with random weights" if args.random else ""))


def _check(args: argparse.Namespace) -> None:
    from evaclip.onnx_check import DEFAULT_PROVIDER, check, require

    ignored = (args.random, args.int8, args.normalize, args.force, args.dtype != "fp32", args.max_patches)
    if args.model is not None or any(ignored):
        raise UserError("--check takes FILE and --provider, and no other option")
    outcomes = check(args.check, args.provider or [DEFAULT_PROVIDER])
    _show(args.check, outcomes)
    require(outcomes, str(args.check))


def _show(file: Path, outcomes: "list[Outcome]") -> None:
    for outcome in outcomes:
        print(f"{file.name}, lowest cosine to the model's embeddings in float32, {outcome}")
