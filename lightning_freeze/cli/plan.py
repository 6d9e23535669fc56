"""`lightning-freeze plan`: what will train when, and what it costs, without training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_freeze.cli.models import MODEL, add_model_arguments, model_of
from lightning_freeze.cli.terminal import WRONG, check_target, say, width, write
from lightning_freeze.errors import ArgumentError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

HELP = "show what will train when, and what it costs"
USAGE = "lightning-freeze plan MODEL [options]"
ABOUT = f"""\
Show what a schedule trains in which epoch, and what a training step costs then, without training.

  lightning-freeze plan timm:resnet18 --epochs 6
      GradualUnfreeze: the head first, then one layer group more in each epoch.
  lightning-freeze plan MODEL --schedule schedule.yaml --epochs 6
      The same with a schedule of yours: a file, or written out, as '{{0: head, 2: "**"}}'.
  lightning-freeze plan MODEL --freeze-backbone --trainable-layers 2
      FreezeBackbone.

{MODEL}"""

# option -> type, metavar, help; the names and defaults are those of `GradualUnfreeze`
_GRADUAL: dict[str, tuple[Any, str, str]] = {
    "start": (int, "N", "epoch (or step) of the first unfreezing: 1"),
    "every": (int, "N", "epochs (or steps) between two: 1"),
    "layers-per-step": (int, "N", "layer groups per unfreezing: 1"),
    "order": (str, "ORDER", "top_down (which it is otherwise) or bottom_up"),
    "unit": (str, "UNIT", "epoch (which it is otherwise) or step"),
    "lr-decay": (float, "D", "a group's learning rate is yours times D ** distance from the top"),
}
_BACKBONE: dict[str, tuple[Any, str, str]] = {
    "trainable-layers": (int, "N", "blocks at the top of the backbone that stay trainable: 0"),
    "unfreeze-at-epoch": (int, "N", "release the backbone at this epoch (LP-FT)"),
    "lr-scale": (float, "F", "factor on the learning rate of the backbone: 1"),
}
_REGULAR = ("start", "every", "layers_per_step", "order")


def epilog() -> str:
    """What the exit status means."""
    return "exit status: 0, or 2 if an argument is wrong or the model can't be found or built."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare what the command takes."""
    add_model_arguments(parser)
    parser.add_argument("--epochs", type=int, metavar="N", help="length of the run: all stages")
    parser.add_argument(
        "--schedule", metavar="FILE", help="a YAML file, or a mapping: epoch -> what unfreezes"
    )
    for option, (kind, metavar, said) in _GRADUAL.items():
        parser.add_argument(f"--{option}", type=kind, metavar=metavar, help=said)
    parser.add_argument(
        "--groups", metavar="LIST", help="your layer groups, bottom to top: '[embed, [a, b], head]'"
    )
    parser.add_argument(
        "--freeze-backbone", action="store_true", help="plan `FreezeBackbone` instead"
    )
    parser.add_argument("--backbone", metavar="NAMES", help="what to freeze: discovered otherwise")
    parser.add_argument("--trainable", metavar="NAMES", help="what stays trainable inside it")
    for option, (kind, metavar, said) in _BACKBONE.items():
        parser.add_argument(f"--{option}", type=kind, metavar=metavar, help=said)
    parser.add_argument("--train-bn", action="store_true", help="batch-norm layers train")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="samples in a step: 1")
    parser.add_argument(
        "--yaml", metavar="FILE", help="write the schedule there, to edit and to give to --schedule"
    )
    parser.add_argument("--overwrite", action="store_true", help="... even if FILE exists")
    parser.add_argument("--json", metavar="FILE", help="also write the plan there, as JSON")
    parser.add_argument("--plot", metavar="FILE", help="also draw it: .png, .svg, .pdf")


def run(arguments: Any) -> int:
    """Print the plan, and give the exit status."""
    from lightning_freeze.checkpoints.files import write_json

    callback = _callback(arguments)  # wrong arguments first: a model may take a while
    check_target("--yaml", arguments.yaml, replace=arguments.overwrite)
    check_target("--json", arguments.json)
    check_target("--plot", arguments.plot)
    _check_picture(arguments.plot)
    source = model_of(arguments, "plan")
    if not any(True for _ in source.model.parameters()):
        raise ArgumentError(f"{source.about} has no parameters, so there is nothing to train.")
    length = arguments.epochs
    if length is None:
        length = _all_stages(callback, source.model)
    preview = callback.preview(source.model, length, batch=arguments.batch)
    if arguments.yaml is not None:
        write("--yaml", arguments.yaml, preview.to_yaml().encode())
    if arguments.json is not None:
        write_json(arguments.json, {"model": source.about, **preview.to_dict()})
    if arguments.plot is not None:
        preview.plot(arguments.plot)
    text = "\n".join([source.about, preview.to_text(width()), *source.notes])
    return 0 if say(text) else WRONG


def _all_stages(callback: Any, model: Any) -> int:
    """The shortest run that reaches every stage."""
    from lightning_freeze.model.index import ModelIndex

    schedule = callback.resolve(ModelIndex.of(model))
    return int(schedule.stages[-1].at) + 1 if schedule.unit == "epoch" else 1


def _callback(arguments: Any) -> Any:
    if arguments.epochs is not None and arguments.epochs < 1:
        raise ArgumentError(f"`--epochs` is {arguments.epochs}. Write a whole number from 1.")
    if arguments.batch < 1:
        raise ArgumentError(f"`--batch` is {arguments.batch}. Write a whole number from 1.")
    gradual = {**_given(arguments, _GRADUAL)}
    backbone = {**_given(arguments, _BACKBONE)}
    for option in ("schedule", "groups"):
        if getattr(arguments, option) is not None:
            gradual[option] = getattr(arguments, option)
    for option in ("backbone", "trainable"):
        if getattr(arguments, option) is not None:
            backbone[option] = _selectors(f"--{option}", getattr(arguments, option))
    if arguments.freeze_backbone:
        _refuse(gradual, "is for `GradualUnfreeze`. Leave out `--freeze-backbone`, or this")
    else:
        _refuse(backbone, "is for `FreezeBackbone`. Add `--freeze-backbone`")
    if "schedule" in gradual:
        regular = {name: gradual[name] for name in _REGULAR if name in gradual}
        _refuse(regular, "has no meaning with `--schedule`, which says all of that. Leave one out")
        gradual["schedule"] = _schedule(gradual["schedule"])
    if "groups" in gradual:
        gradual["groups"] = _yaml("--groups", gradual["groups"])

    from lightning_freeze import FreezeBackbone, GradualUnfreeze

    if arguments.freeze_backbone:
        return FreezeBackbone(train_bn=arguments.train_bn, **backbone)
    return GradualUnfreeze(train_bn=arguments.train_bn, **gradual)


def _given(arguments: Any, options: dict[str, Any]) -> dict[str, Any]:
    names = [option.replace("-", "_") for option in options]
    return {name: arguments[name] for name in names if arguments[name] is not None}


def _refuse(given: dict[str, Any], why: str) -> None:
    for name in given:
        raise ArgumentError(f"`--{name.replace('_', '-')}` {why}.")


def _schedule(text: str) -> Any:
    """A mapping that is written out, or the name of a file."""
    if text.lstrip().startswith("{"):
        return _yaml("--schedule", text)
    return text


def _selectors(option: str, text: str) -> Any:
    """A list that is written out, or one selector, which may hold anything."""
    return _yaml(option, text) if text.lstrip().startswith("[") else text


def _yaml(option: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ArgumentError(f"`{option} {text}` is not valid YAML: {said}.") from error


def _check_picture(path: str | None) -> None:
    if path is None:
        return
    from pathlib import Path

    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError("`--plot` needs matplotlib: `pip install matplotlib`.") from error
    formats = Figure().canvas.get_supported_filetypes()
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix and suffix not in formats:
        raise ArgumentError(
            f"`--plot {path}` has a suffix that isn't a picture's. Write one of: "
            f"{', '.join(sorted(formats))}."
        )
