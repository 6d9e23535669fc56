"""The command line: `lightning-freeze`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lightning_freeze.errors import ArgumentError, FreezeError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

WRONG = 2

_ABOUT = "Prove what a training run with frozen layers did, from its files."
_VERIFY = """\
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


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; those of the process where None.

    Returns:
        The exit status: 0 for yes, 1 for no, 2 where there is no answer.
    """
    try:
        arguments = _parser().parse_args(argv)
        found = _verify(arguments.verify)
    except SystemExit as end:  # argparse's way to say that it has said all
        return end.code if isinstance(end.code, int) else WRONG
    except (FreezeError, OSError) as error:
        _complain(str(error))
        return WRONG
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # a traceback would end with status 1, which says that weights changed
        _complain(f"unexpected {type(error).__name__}: {error}. Please report it.")
        return WRONG
    said = _say(found.to_text(tensors=arguments.verify.tensors))
    return found.status if said else WRONG


def _parser() -> ArgumentParser:
    from argparse import Action, RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    from lightning_freeze import __version__
    from lightning_freeze.verify.certified import ABOUT_WEIGHTS

    class Help(DefaultHelpFormatter, RawDescriptionHelpFormatter):
        """Descriptions as they are written, and no "(default: null)"."""

        def _get_help_string(self, action: Action) -> str:
            return action.help or ""

    parser = ArgumentParser(
        prog="lightning-freeze", description=_ABOUT, version=__version__, formatter_class=Help
    )
    verify = ArgumentParser(
        usage="lightning-freeze verify BASE [CHECKPOINT] [options]",
        description=_VERIFY,
        epilog=_STATUS.format(codes=", ".join(sorted(ABOUT_WEIGHTS))),
        formatter_class=Help,
    )
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
    commands = parser.add_subcommands(required=True)
    commands.add_subcommand("verify", verify, help="compare weights to the bit")
    return parser


def _verify(arguments: Any) -> Any:
    from lightning_freeze.files import write_json
    from lightning_freeze.verify.run import verify

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


def _say(text: str) -> bool:
    """Print; False where it couldn't be written. A reader who has seen enough is no error."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a terminal that has no lines to draw
    try:
        print(text, flush=True)
    except OSError as error:
        _give_up(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            _complain(f"the result can't be printed: {error}")
            return False
    return True


def _complain(text: str) -> None:
    """Print to stderr, if that is there and can be written to: the exit status says it as well."""
    from lightning_freeze.verify.spelling import printable_lines

    if sys.stderr is None:  # or it would go to stdout
        return
    try:
        print(f"lightning-freeze: {printable_lines(text)}", file=sys.stderr, flush=True)
    except OSError:
        _give_up(sys.stderr)


def _give_up(stream: TextIO) -> None:
    """Let go of what can't be printed, or Python would try once more, and complain, at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
