"""`evaclip convert`: weights under the names of another library, and means of weights."""

import argparse
from pathlib import Path
from typing import Any

from evaclip.commands.parser import leaf
from evaclip.errors import UserError

_EXAMPLES = (
    "evaclip convert EVA02_CLIP_B_psz16_s8B.pt b16.safetensors --to open_clip",
    "evaclip convert runs/demo demo.pt --to original",
    "evaclip convert hf-hub:timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k b16.pt --to original",
    "evaclip convert zero-shot.safetensors wise.safetensors --to safetensors --interpolate runs/finetune 0.5",
    "evaclip convert runs/a soup.safetensors --to safetensors --average runs/b runs/c",
)
_FORMATS = ("original", "open_clip", "timm", "safetensors")


def add_commands(subparsers: Any) -> None:
    """Add `convert` to the command line."""
    help = "write weights under the names of another library, or average them"
    parser = leaf(subparsers, "convert", _run, help=help, examples=_EXAMPLES)
    add, mean = parser.add_argument, parser.add_mutually_exclusive_group()
    add("source", metavar="IN", help="weights file, checkpoint or run folder, or hf-hub:OWNER/NAME[/FILE]")
    add("target", metavar="OUT", type=Path, help="file to write: .safetensors, .pt, .pth or .bin")
    add("--to", choices=_FORMATS, required=True, help="tensor names; timm has the image tower only")
    add("--model", help="name of the model (default: as the checkpoint says, or by the shapes)")
    mean.add_argument(
        "--interpolate",
        nargs=2,
        metavar=("OTHER", "ALPHA"),
        help="write (1 - ALPHA) IN + ALPHA OTHER (WiSE-FT: IN is the zero-shot model, OTHER the fine-tuned one)",
    )
    mean.add_argument("--average", nargs="+", metavar="OTHER", help="write the mean of IN and OTHER... (a model soup)")
    add("--force", action="store_true", help="replace OUT if it exists; inputs are never replaced")


def _run(args: argparse.Namespace) -> None:
    # Imported here so that `evaclip --help` doesn't wait for torch.
    from evaclip.atomic import write_text
    from evaclip.outputs import check_output
    from evaclip.weights.convert import convert
    from evaclip.weights.files import find_weights
    from evaclip.weights.publish import prepare_card

    source = find_weights(args.source, args.model or "")
    others = [(find_weights(other, args.model or ""), share) for other, share in _shares(args)]
    check_output(args.target, overwrite=args.force, sources=[source])
    card = prepare_card(args.target, args.source, overwrite=args.force)
    convert(source, args.target, args.to, args.model, others=others, overwrite=args.force)
    if card:
        write_text(*card)
    print(f"wrote {args.target}")


def _shares(args: argparse.Namespace) -> list[tuple[str, float]]:
    """The other weights and their shares in the mean."""
    if args.interpolate:
        other, text = args.interpolate
        try:
            alpha = float(text)
        except ValueError:
            raise UserError(f"--interpolate ALPHA must be a number, got {text!r}") from None
        if not 0 <= alpha <= 1:
            raise UserError(f"--interpolate ALPHA must be in [0, 1], got {text}")
        return [(other, alpha)]
    others = args.average or []
    return [(other, 1 / (1 + len(others))) for other in others]
