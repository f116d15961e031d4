"""`evaclip export`: the towers of a model as programs that run without it, for torch and for ONNX runtimes."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaclip.commands.parser import leaf
from evaclip.errors import UserError

if TYPE_CHECKING:
    from evaclip.portable.check import Outcome

_TOWERS = ("image", "text")
_DTYPES = ("fp32", "fp16", "bf16")
_LAYOUTS = ("immich", "transformers.js")
_ENGINES = ("onnxruntime", "openvino")


def add_commands(subparsers: Any) -> None:
    """Adds `export` to the command line."""
    parser = leaf(
        subparsers,
        "export",
        help="write the towers of a model as programs of torch.export or ONNX (opset 20), for any batch size; an ONNX "
        "file holds inputs and embeddings, and is written only if ONNX Runtime reproduces these",
        examples=[
            "evaclip export EVA02-CLIP-B-16 image.onnx --tower image --pretrained merged2b_s8b_b131k",
            "evaclip export runs/demo text.pt2 --tower text",
            "evaclip export runs/demo immich/emoji --layout immich",
            "evaclip export --check image.onnx --provider CPUExecutionProvider",
        ],
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a model's name; or a run or checkpoint folder, which is exported as it was trained",
    )
    parser.add_argument(
        "target", metavar="OUT", nargs="?", type=Path, help="what to write: .pt2 (torch.export), .onnx, or a folder"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tower", choices=_TOWERS, help="which half of the model")
    what.add_argument("--layout", choices=_LAYOUTS, help="both halves, in a new folder that this program loads")
    what.add_argument("--check", metavar="FILE", type=Path, help="run the probe that an exported ONNX file holds")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", help="weights: a file, a folder, a tag, hf-hub:OWNER/NAME")
    weights.add_argument("--random", action="store_true", help="random weights, to try out what runs the program")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--dtype", choices=_DTYPES, default="fp32", help="of ONNX weights (default: %(default)s)")
    kinds.add_argument("--int8", action="store_true", help="ONNX with matrix products of 8-bit integers")
    parser.add_argument("--normalize", action="store_true", help="divide the embeddings by their L2 norm")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a file that exists")
    parser.add_argument("--engine", choices=_ENGINES, help=f"what --check runs the file in (default: {_ENGINES[0]})")
    parser.add_argument("--provider", nargs="+", help="execution providers of ONNX Runtime that --check tries")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.check:
        _check(args)
        return
    if args.model is None or args.target is None:
        raise UserError("MODEL and OUT aren't both given; expected `evaclip export MODEL OUT ...`")
    if args.engine or args.provider:
        raise UserError("--engine and --provider say where --check FILE runs a file that is there; leave them out")
    is_run = not args.pretrained and not args.random
    if is_run and not Path(args.model).is_dir():
        raise UserError("one of the arguments --pretrained --random is required, unless MODEL is a run or checkpoint")
    # Imported here so that `evaclip --help` doesn't wait for torch.
    from evaclip.atomic import write_text
    from evaclip.factory import create_model, get_config
    from evaclip.loading import read_checkpoint
    from evaclip.model.config import override
    from evaclip.model.export import check_target, export
    from evaclip.weights.card import card_beside, is_of_run, run_facts

    origin = args.model if is_run else args.pretrained
    options: dict[str, Any] = {}
    name, weights = args.model, args.pretrained
    if is_run:
        name, weights, options, _ = read_checkpoint(Path(args.model), average=True)
    # Before the weights are fetched.
    if args.layout:
        from evaclip.portable.layouts import check_folder, export_folder

        check_folder(args.target, override(get_config(name), options))
    else:
        check_target(args.target, args.force, args.dtype, args.int8)
    beside = None if args.layout else card_beside(args.target, origin, overwrite=args.force)
    model = create_model(name, pretrained=weights, **options).eval()
    kind = {"dtype": args.dtype, "int8": args.int8}
    if args.layout:
        card = run_facts(origin) if is_of_run(origin) else None
        for half, outcomes in export_folder(model, args.target, args.layout, **kind, model_card=card).items():
            _show(half, outcomes)
    else:
        kind |= {"normalize": args.normalize, "overwrite": args.force}
        _show(args.target.name, export(model, args.tower, args.target, **kind))
        if beside:
            write_text(*beside)
    print(f"wrote {args.target}" + (", with random weights" if args.random else ""))


def _check(args: argparse.Namespace) -> None:
    from evaclip.portable.check import DEFAULT_PROVIDER, check, read_probe, require

    ignored = (args.pretrained, args.random, args.int8, args.normalize, args.force, args.dtype != "fp32")
    if args.model is not None or any(ignored):
        raise UserError("--check takes a file, --engine and --provider and nothing else; leave the rest out")
    if args.provider and args.engine == "openvino":
        raise UserError("--provider is ONNX Runtime's; leave it out with --engine openvino")
    outcomes = check(args.check, args.engine or "onnxruntime", args.provider or [DEFAULT_PROVIDER])
    _show(args.check.name, outcomes)
    require(outcomes, read_probe(args.check).lowest, str(args.check))


def _show(name: str, outcomes: "list[Outcome]") -> None:
    if outcomes:
        from evaclip.portable.check import table

        print(f"{name}, lowest cosine to the model's embeddings in float32:\n{table(outcomes)}")
