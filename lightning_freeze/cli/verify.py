"""`lightning-freeze verify`: what differs between two files of weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_freeze.cli.terminal import WRONG, say
from lightning_freeze.errors import ArgumentError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

HELP = "compare weights to the bit"
USAGE = "lightning-freeze verify BASE [CHECKPOINT] [options]"
ABOUT = """\
Compare two files of weights to the bit, layer group by layer group.

  lightning-freeze verify BASE CHECKPOINT
      Is every tensor that both files have identical?
  lightning-freeze verify BASE CHECKPOINT --certificate FILE
      Do the tensors that the certificate calls frozen still have its bytes, and, where they were
      frozen from the start, those of BASE? What was free to train doesn't count.
  lightning-freeze verify CHECKPOINT --certificate FILE
      The same without BASE. FILE may be the checkpoint itself.

A file is a Lightning checkpoint, a state dict (.pt, .pth, .bin), a safetensors file, or a folder
that `save_pretrained` wrote. Nothing in a file is executed. Names may begin differently
(`bert.` in BASE, `model.bert.` in CHECKPOINT).
"""
_STATUS = """\
exit status: 0 if it is as it has to be, 1 if anything changed, 2 if it couldn't be verified
(a wrong argument, a file that can't be read or is refused, a different model, a certified tensor
that CHECKPOINT doesn't hold). What a run found by itself ends with 1 if it is about weights:
{codes}.
Anything else that a certificate records, such as no-gradient, is printed and doesn't count.
"""


def epilog() -> str:
    """What the exit status means."""
    from lightning_freeze.checkpoints.verify.certified import ABOUT_WEIGHTS

    return _STATUS.format(codes=", ".join(sorted(ABOUT_WEIGHTS)))


def add_arguments(verify: ArgumentParser) -> None:
    """Declare what the command takes."""
    verify.add_argument(
        "base", metavar="BASE", nargs="?", help="the weights that the run began with"
    )
    verify.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="the weights to verify")
    verify.add_argument(
        "--certificate",
        metavar="FILE",
        help="what says which tensors were frozen: a certificate, an audit report or a checkpoint",
    )
    verify.add_argument(
        "--prefix",
        metavar="P",
        help="where the common part begins, if a file holds it several times, such as `student`",
    )
    verify.add_argument("--json", metavar="FILE", help="also write the result there, as JSON")
    verify.add_argument("--tensors", action="store_true", help="also list every changed tensor")


def run(arguments: Any) -> int:
    """Compare, print, and give the exit status."""
    found = _verify(arguments)
    return int(found.status) if say(found.to_text(tensors=arguments.tensors)) else WRONG


def _verify(arguments: Any) -> Any:
    from lightning_freeze.checkpoints.files import write_json
    from lightning_freeze.checkpoints.verify.run import verify

    base, checkpoint = arguments.base, arguments.checkpoint
    if base is None:
        raise ArgumentError(
            "`verify` needs a file: `lightning-freeze verify BASE CHECKPOINT`, or one file and "
            "`--certificate FILE`. `lightning-freeze verify --help` says more."
        )
    if checkpoint is None:
        base, checkpoint = None, base
    if arguments.json is not None:
        _spare(arguments.json, [base, checkpoint, arguments.certificate])
    found = verify(base, checkpoint, arguments.certificate, arguments.prefix)
    if arguments.json is not None:
        try:
            write_json(arguments.json, found.to_dict())
        except OSError as error:
            raise ArgumentError(
                f"`--json {arguments.json}` can't be written: {error.strerror}. Name another file."
            ) from error
    return found


def _spare(target: str, inputs: list[str | None]) -> None:
    """Keep the result from being written over what it is about."""
    target = os.path.expanduser(target)
    if Path(target).is_dir():
        raise ArgumentError(f"`--json {target}` is a folder. Name a file to write.")
    for path in inputs:
        if path and os.path.exists(path) and os.path.exists(target):
            # a file in a folder of weights, too
            inside = Path(path).resolve() in Path(target).resolve().parents
            if inside or os.path.samefile(path, target):
                raise ArgumentError(
                    f"`--json {target}` would be written over what it is about. Name another file."
                )
