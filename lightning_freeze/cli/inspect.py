"""`lightning-freeze inspect`: which layer groups a model has, and how they were found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_freeze.cli.models import MODEL, add_model_arguments, model_of
from lightning_freeze.cli.terminal import WRONG, check_target, say, width

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

HELP = "show a model's layer groups"
USAGE = "lightning-freeze inspect MODEL [options]"
ABOUT = f"""\
Show the layer groups of a model, bottom to top: what freezes and unfreezes as one.

{MODEL}"""


def epilog() -> str:
    """What the exit status means."""
    return "exit status: 0, or 2 if the model can't be found or built."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare what the command takes."""
    add_model_arguments(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", metavar="FILE", help="also write it there, as JSON")


def run(arguments: Any) -> int:
    """Print it, and give the exit status."""
    from lightning_freeze.anatomy import Inspection
    from lightning_freeze.files import write_json

    check_target("--json", arguments.json)
    source = model_of(arguments, "inspect")
    found = Inspection.of(source.model, source.about, source.notes)
    if arguments.json is not None:
        write_json(arguments.json, found.to_dict())
    return 0 if say(found.to_text(tensors=arguments.tensors, width=width())) else WRONG
