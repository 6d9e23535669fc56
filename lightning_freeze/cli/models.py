"""The arguments that say which model is meant; `inspect` and `plan` share them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from lightning_freeze.model.load import Source

MODEL = """\
MODEL is one of:
  a folder that `save_pretrained` wrote, or a config.json      (transformers)
  a name on the hub, such as google-bert/bert-base-uncased     (transformers)
  timm:NAME, torchvision:NAME                                  such as timm:resnet18
  package.module:callable                                      a function, class or model of yours
No weights are loaded unless you ask for them with --weights: only shapes count.
"""


def add_model_arguments(parser: ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="see above")
    parser.add_argument(
        "--task",
        metavar="NAME",
        help="transformers: what the model is for, such as sequence-classification",
    )
    parser.add_argument(
        "--class",
        dest="class_name",
        metavar="NAME",
        help="transformers: its class, such as AutoModelForSequenceClassification; the config's "
        "own otherwise",
    )
    parser.add_argument("--weights", action="store_true", help="load the weights, too")


def model_of(arguments: Any, command: str) -> Source:
    """The model that a user named."""
    from lightning_freeze.errors import ArgumentError
    from lightning_freeze.model.load import find_model

    if arguments.model is None:
        raise ArgumentError(
            f"`{command}` needs a model: `lightning-freeze {command} MODEL`. "
            f"`lightning-freeze {command} --help` says what it may be."
        )
    return find_model(
        arguments.model,
        task=arguments.task,
        class_name=arguments.class_name,
        weights=arguments.weights,
    )
