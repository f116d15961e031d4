"""`evaclip weights`: what a sharded run leaves in parts, made whole."""

import argparse
from pathlib import Path
from typing import Any

from evaclip.commands.parser import leaf
from evaclip.errors import UserError


def add_commands(subparsers: Any) -> None:
    """Adds `weights` with its verb to the command line."""
    parser = subparsers.add_parser("weights", help="join the weights of a sharded run")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    join = leaf(
        verbs,
        "join",
        help="make model.safetensors and ema.safetensors of a checkpoint's parts, as the first who reads them would",
        examples=["evaclip weights join runs/mine", "evaclip weights join runs/mine/checkpoints/step_00000100"],
    )
    join.add_argument(
        "source", metavar="RUN", type=Path, help="run folder (its latest checkpoint) or checkpoint folder"
    )
    join.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    # Imported here so that `evaclip --help` doesn't wait for torch.
    from evaclip.run_files import EMA_FILE, MODEL_FILE
    from evaclip.weights.files import find_weights
    from evaclip.weights.parts import is_there, joined

    model = find_weights(args.source, "")
    if model.name != MODEL_FILE:
        raise UserError(f"{str(args.source)!r} is no run or checkpoint folder, which alone has weights in parts")
    for path in (model, model.with_name(EMA_FILE)):
        if is_there(path):
            print(joined(path))
