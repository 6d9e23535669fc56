"""`lightning-freeze inspect`: which layer groups a model has, and how they were found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_freeze.cli.models import MODEL, add_model_arguments, model_of
from lightning_freeze.cli.terminal import WRONG, check_target, say, width

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

HELP = "show a model's layer groups"
USAGE = "lightning-freeze inspect MODEL [options]"
ABOUT = f"""\
Show the layer groups of a model, bottom to top: what freezes and unfreezes as one. With a folder of
weights, or --origin, also which tensors are in the checkpoint, which are new, and what isn't used.

{MODEL}"""


def epilog() -> str:
    """What the exit status means."""
    return "exit status: 0, or 2 if the model can't be found or built."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare what the command takes."""
    add_model_arguments(parser)
    parser.add_argument(
        "--origin",
        metavar="FILE",
        help="the checkpoint that the model is loaded from: a file or a folder; that of MODEL "
        "itself where it is a folder with weights",
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", metavar="FILE", help="also write it there, as JSON")


def _weights_in(model: str) -> str | None:
    """A folder that holds weights, not only a config."""
    folder = Path(model)
    inside = ("*.safetensors", "*.bin", "*.safetensors.index.json")
    return model if folder.is_dir() and any(any(folder.glob(name)) for name in inside) else None


def run(arguments: Any) -> int:
    """Print it, and give the exit status."""
    from lightning_freeze.checkpoints.files import write_json
    from lightning_freeze.report.inspection import Inspection

    check_target("--json", arguments.json)
    source = model_of(arguments, "inspect")
    origin = arguments.origin or _weights_in(arguments.model)
    found = Inspection.of(source.model, source.about, source.notes, origin)
    if arguments.json is not None:
        write_json(arguments.json, found.to_dict())
    return 0 if say(found.to_text(tensors=arguments.tensors, width=width())) else WRONG
