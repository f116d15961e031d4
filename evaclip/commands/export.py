"""`evaclip export`: the towers of a model as programs that run without it, for torch and for ONNX runtimes."""

import argparse
from pathlib import Path
from typing import Any

from evaclip.commands.parser import leaf

_TOWERS = ("image", "text")


def add_commands(subparsers: Any) -> None:
    """Adds `export` to the command line."""
    parser = leaf(
        subparsers,
        "export",
        help="write a tower of a model as a program of torch.export or ONNX, for any batch size",
        examples=[
            "evaclip export EVA02-CLIP-B-16 image.onnx --tower image --pretrained merged2b_s8b_b131k",
            "evaclip export emoji text.pt2 --tower text --pretrained runs/demo",
        ],
    )
    parser.add_argument("model", metavar="MODEL", help="name of the model")
    parser.add_argument("target", metavar="OUT", type=Path, help="file to write: .pt2 (torch.export) or .onnx")
    parser.add_argument("--tower", choices=_TOWERS, required=True, help="which half of the model")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--pretrained", help="weights: a file, a folder, a tag, hf-hub:OWNER/NAME")
    weights.add_argument("--random", action="store_true", help="random weights, to try out what runs the program")
    parser.add_argument("--normalize", action="store_true", help="divide the embeddings by their L2 norm")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    # Imported here so that `evaclip --help` doesn't wait for torch.
    from evaclip.factory import create_model
    from evaclip.model.export import check_target, export

    # Before the weights are fetched.
    check_target(args.target, args.force)
    model = create_model(args.model, pretrained=args.pretrained).eval()
    export(model, args.tower, args.target, normalize=args.normalize, overwrite=args.force)
    print(f"wrote {args.target}" + (", with random weights" if args.random else ""))
