"""Are flags (`requires_grad`) and modes (train, eval) what was declared?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from lightning_freeze.apply import can_train
from lightning_freeze.audit.causes import part_of_fit
from lightning_freeze.audit.findings import Seen
from lightning_freeze.audit.trace import Flip
from lightning_freeze.names import ModelIndex, some

Who = Callable[[str, str], str]


def flipped(
    before: ModelIndex,
    now: ModelIndex,
    frozen: Collection[str],
    still: Iterable[str],
    flips: Mapping[str, Flip],
    who: Who,
) -> list[Seen]:
    """Flags that aren't what was declared.

    Args:
        before: the model when it was declared.
        now: the model as it is.
        frozen: names of what was declared frozen.
        still: paths of wholly frozen modules, in which nothing new may train.
        flips: when each flag was seen to change.
        who: says which code runs between two looks.
    """
    on, off, new = [], [], []
    inside = tuple(f"{path}." for path in still if path)
    for name, parameter in now.parameters.items():
        if name in before.canonical:
            declared = before.canonical[name] not in frozen
            if parameter.requires_grad and not declared:
                on.append(name)
            elif not parameter.requires_grad and declared and can_train(parameter):
                off.append(name)
        elif parameter.requires_grad and inside and name.startswith(inside):
            new.append(name)
    groups: dict[tuple[str, str, str], list[str]] = {}
    rules = (
        (on, "requires a gradient although it was declared frozen", "set it to True"),
        (off, "requires no gradient although it was declared trainable", "set it to False"),
        (new, "is a new trainable parameter in a frozen module", "added it after the fit began"),
    )
    for names, what, did in rules:
        for name in names:
            groups.setdefault((what, did, _when(flips.get(name), who)), []).append(name)
    return [
        Seen(
            "flag-changed",
            tuple(names),
            f"{some(names)} {what}",
            f"Other code {did}{when}{_together(now, names)}.",
            "Let one place decide: name it in `trainable`, `backbone` or the schedule.",
            since=min((flips[name].at for name in names if name in flips), default=None),
        )
        for (what, did, when), names in groups.items()
    ]


def _when(flip: Flip | None, who: Who) -> str:
    if flip is None:
        return ""
    runs = who(flip.after, flip.before)
    return f", {part_of_fit(flip.after, flip.before)}{f' (there: {runs})' if runs else ''}"


def _together(index: ModelIndex, names: list[str]) -> str:
    """The module whose parameters these are all of: then one call on it did it."""
    if len(names) < 2:
        return ""
    chosen = set(names)
    for path, module in index.modules.items():
        if chosen == set(index.within(module)):
            where = f"`{path}`" if path else "the whole model"
            return f": all of {where} at once, as one `requires_grad_()` on it does"
    return ""


def awake(now: ModelIndex, quiet: Iterable[str], modes: Mapping[str, Flip], who: Who) -> list[Seen]:
    """Frozen modules that left eval mode."""
    up = [path for path in quiet if path in now.modules and now.modules[path].training]
    if not up:
        return []
    chosen = set(up)
    tops = sorted(p for p in up if p.rpartition(".")[0] not in chosen or not p)
    around = all(module.training for module in now.modules.values())
    on_what = "the whole model" if around else "it or on a module around it"
    return [
        Seen(
            "mode-changed",
            tuple(tops),
            f"{some(tops)} left eval mode although frozen",
            f"Some code called `train()` on {on_what}{_when(modes.get(tops[0]), who)}.",
            "Use `FreezeBackbone` or `GradualUnfreeze`, which put it back, or call `eval()` "
            "on it in `on_train_epoch_start`.",
            since=modes[tops[0]].at if tops[0] in modes else None,
        )
    ]
