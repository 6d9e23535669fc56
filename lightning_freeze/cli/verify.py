"""`lightning-freeze verify`: what differs between two files of weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_freeze.cli.terminal import WRONG, complain, say
from lightning_freeze.errors import ArgumentError, VerifyError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

HELP = "compare weights to the bit"
USAGE = "lightning-freeze verify BASE [CHECKPOINT] [options]"
ABOUT = """\
Compare two files of weights to the bit, layer group by layer group.

  lightning-freeze verify BASE CHECKPOINT
      Do the tensors that the certificate in CHECKPOINT calls frozen still have its bytes, and,
      where they were frozen from the start, those of BASE? What was free to train doesn't count.
      Where CHECKPOINT holds no certificate: is every tensor that both files have identical?
  lightning-freeze verify BASE CHECKPOINT --certificate FILE
      The same by another certificate.
  lightning-freeze verify CHECKPOINT [--certificate FILE]
      The same without BASE.

A file is a Lightning checkpoint, a state dict (.pt, .pth, .bin), a safetensors file, or a folder
that `save_pretrained` wrote. Nothing in a file is executed. Names may begin differently
(`bert.` in BASE, `model.bert.` in CHECKPOINT).
"""
_STATUS = """\
exit status and first words: 0, OK, if it is as it has to be; 1, CHANGED, if anything changed; 2,
CANNOT VERIFY (a file that can't be read or is refused, a different model, a certified tensor that
CHECKPOINT doesn't hold; also a wrong argument). What a run found by itself ends with 1 if it is
about weights: {codes}.
Anything else that a certificate records, such as no-gradient, is printed and doesn't count.
"""


def epilog() -> str:
    """What the exit status means."""
    from lightning_freeze.checkpoints.verify.result import ABOUT_WEIGHTS

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
        help="what says which tensors were frozen: a certificate, an audit report or a checkpoint; "
        "the one in CHECKPOINT where nothing is said",
    )
    verify.add_argument(
        "--no-certificate",
        action="store_true",
        help="compare all tensors, whatever the certificate in CHECKPOINT says",
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
    from lightning_freeze.checkpoints.files import write_json
    from lightning_freeze.checkpoints.verify.compare import verify
    from lightning_freeze.checkpoints.verify.result import LABELS

    base, checkpoint = arguments.base, arguments.checkpoint
    if base is None:
        raise ArgumentError(
            "`verify` needs a file: `lightning-freeze verify BASE CHECKPOINT`, or one file that "
            "holds a certificate. `lightning-freeze verify --help` says more."
        )
    if checkpoint is None:
        base, checkpoint = None, base
    certificate, own = arguments.certificate, not arguments.no_certificate
    if arguments.json is not None:
        _spare(arguments.json, [base, checkpoint, certificate])
    if certificate is not None and not own:
        raise ArgumentError("`--certificate` and `--no-certificate` exclude each other.")
    try:
        found = verify(base, checkpoint, certificate, arguments.prefix, own=own)
    except VerifyError as error:
        complain(str(error), LABELS[WRONG])
        return WRONG
    if arguments.json is not None:
        try:
            write_json(arguments.json, found.to_dict())
        except OSError as error:
            raise ArgumentError(
                f"`--json {arguments.json}` can't be written: {error.strerror}. Name another file."
            ) from error
    return found.status if say(found.to_text(tensors=arguments.tensors)) else WRONG


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
