"""The command line: `lightning-freeze`. Each command has a file of its own here."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from lightning_freeze.cli.terminal import WRONG, complain
from lightning_freeze.errors import FreezeError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_ABOUT = (
    "See which layers a model has, plan what trains when and what it costs, and prove what a run "
    "with frozen layers did."
)
_COMMANDS = ("inspect", "plan", "verify")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; those of the process where None.

    Returns:
        The exit status: 0 for yes, 1 for no, 2 where there is no answer.
    """
    try:
        arguments = _parser(sys.argv[1:] if argv is None else argv).parse_args(argv)
        name = arguments.subcommand
        return int(_command(name).run(arguments[name]))
    except SystemExit as end:  # argparse's way to say that it has said all
        return end.code if isinstance(end.code, int) else WRONG
    except (FreezeError, OSError) as error:
        complain(str(error))
        return WRONG
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # a traceback would end with status 1, which says that weights changed
        complain(f"unexpected {type(error).__name__}: {error}. Please report it.")
        return WRONG


def _command(name: str) -> Any:
    return importlib.import_module(f"lightning_freeze.cli.{name}")


def _parser(argv: list[str]) -> ArgumentParser:
    from argparse import Action, RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    from lightning_freeze import __version__

    class Help(DefaultHelpFormatter, RawDescriptionHelpFormatter):
        """Descriptions as they are written, and no "(default: null)"."""

        def _get_help_string(self, action: Action) -> str:
            return action.help or ""

    parser = ArgumentParser(
        prog="lightning-freeze", description=_ABOUT, version=__version__, formatter_class=Help
    )
    commands = parser.add_subcommands(required=True)
    for name in _COMMANDS:
        command = _command(name)
        # what a command says at its help's end may need a heavy import
        asked = name in argv
        described = ArgumentParser(
            usage=command.USAGE,
            description=command.ABOUT,
            epilog=command.epilog() if asked else None,
            formatter_class=Help,
        )
        command.add_arguments(described)
        commands.add_subcommand(name, described, help=command.HELP)
    return parser
