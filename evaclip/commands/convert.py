"""`evaclip convert`: weights under the names of another library."""

import argparse
from pathlib import Path
from typing import Any

from evaclip.commands.parser import leaf

_FORMATS = ("original", "open_clip", "timm", "safetensors")


def add_commands(subparsers: Any) -> None:
    """Adds `convert` to the command line."""
    parser = leaf(
        subparsers,
        "convert",
        help="write weights under the names of another library; no value changes",
        examples=[
            "evaclip convert EVA02_CLIP_B_psz16_s8B.pt b16.safetensors --to open_clip",
            "evaclip convert runs/demo demo.pt --to original",
            "evaclip convert hf-hub:timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k b16.pt --to original",
        ],
    )
    parser.add_argument(
        "source", metavar="IN", help="weights file, checkpoint or run folder, or hf-hub:OWNER/NAME[/FILE]"
    )
    parser.add_argument("target", metavar="OUT", type=Path, help="file to write: .safetensors, .pt, .pth or .bin")
    parser.add_argument("--to", choices=_FORMATS, required=True, help="tensor names; timm has the image tower only")
    parser.add_argument("--model", help="name of the model (default: as the checkpoint says, or by the shapes)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists; inputs are never replaced")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    # Imported here so that `evaclip --help` doesn't wait for torch.
    from evaclip.atomic import write_text
    from evaclip.outputs import check_output
    from evaclip.weights.convert import convert
    from evaclip.weights.files import find_weights
    from evaclip.weights.publish import card_beside

    source = find_weights(args.source, args.model or "")
    check_output(args.target, overwrite=args.force, sources=[source])
    card = card_beside(args.target, args.source, overwrite=args.force)
    convert(source, args.target, args.to, args.model, overwrite=args.force)
    if card:
        write_text(*card)
    print(f"wrote {args.target}")
