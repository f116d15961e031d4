"""`evaclip convert`: weights under the names of another library, and means of weights."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from evaclip.commands.parser import leaf
from evaclip.errors import UserError

_EXAMPLES = (
    "evaclip convert EVA02_CLIP_B_psz16_s8B.pt b16.safetensors --to open_clip",
    "evaclip convert runs/demo demo.pt --to original",
    "evaclip convert hf-hub:timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k b16.pt --to original",
    "evaclip convert runs/demo demo --to transformers",
    "evaclip convert zero-shot.safetensors wise.safetensors --to safetensors --interpolate runs/finetune 0.5",
    "evaclip convert runs/a soup.safetensors --to safetensors --average runs/b runs/c",
)
_FORMATS = ("original", "open_clip", "timm", "safetensors", "transformers")


def add_commands(subparsers: Any) -> None:
    """Add `convert` to the command line."""
    help = "write weights under the names of another library, or average them"
    parser = leaf(subparsers, "convert", _run, help=help, examples=_EXAMPLES)
    add, mean = parser.add_argument, parser.add_mutually_exclusive_group()
    add("source", metavar="IN", help="weights file, checkpoint or run folder, or hf-hub:OWNER/NAME[/FILE]")
    add("target", metavar="OUT", type=Path, help="file: .safetensors, .pt, .pth or .bin; a folder for transformers")
    add("--to", choices=_FORMATS, required=True, help="tensor names; timm has the image tower only")
    add("--no-average", action="store_true", help="a run's raw weights, not their moving average")
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

    if args.to == "transformers":
        _write_folder(args)
        return
    find = partial(find_weights, model=args.model or "", average=not args.no_average)
    source, others = find(args.source), [(find(other), share) for other, share in _shares(args)]
    check_output(args.target, overwrite=args.force, sources=[source])
    run = None if others else args.source  # a mean is of no run
    card = prepare_card(args.target, run, overwrite=args.force, average=not args.no_average)
    convert(source, args.target, args.to, args.model, others=others, overwrite=args.force)
    if card:
        write_text(*card)
    print(f"wrote {args.target}")


def _write_folder(args: argparse.Namespace) -> None:
    from evaclip.loading import load_model
    from evaclip.weights.convert import identify
    from evaclip.weights.files import load_state_dict, read_model_options
    from evaclip.weights.for_transformers import save_for_transformers
    from evaclip.weights.publish import has_run_facts, run_facts

    if args.interpolate or args.average:
        raise UserError("--to must be safetensors with --interpolate and --average, got transformers")
    name, file = args.model, Path(args.source)
    if name is None and file.is_file():
        name = read_model_options(file).get("name") or identify(load_state_dict(file))
    source = f"{name}:{args.source}" if name else args.source
    model = load_model(source, random=False, average=not args.no_average).model
    facts = run_facts(args.source, average=not args.no_average) if has_run_facts(args.source) else None
    save_for_transformers(model, args.target, facts=facts, overwrite=args.force)
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
