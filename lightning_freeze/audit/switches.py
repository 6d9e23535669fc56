"""Are flags (`requires_grad`) and modes (train, eval) what was declared?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from lightning_freeze.audit.causes import when
from lightning_freeze.audit.declared import Declared
from lightning_freeze.audit.findings import Seen
from lightning_freeze.audit.moods import is_dropout, minds_its_mode
from lightning_freeze.audit.trace import Flip
from lightning_freeze.engine.flags import can_train, is_batch_norm
from lightning_freeze.model.index import ModelIndex, some

Who = Callable[[str, str], str]


def flipped(
    before: ModelIndex,
    now: ModelIndex,
    declared: Declared,
    flips: Mapping[str, Flip],
    who: Who,
) -> list[Seen]:
    """Flags that aren't what was declared.

    Args:
        before: the model when it was declared.
        now: the model as it is.
        declared: what holds.
        flips: when each flag was seen to change.
        who: says which code runs between two looks.
    """
    on, off, new = [], [], []
    inside = tuple(f"{path}." for path in declared.still if path)
    for name, parameter in now.parameters.items():
        first = before.canonical.get(name)
        if name in declared.ignored or first in declared.ignored:
            continue
        if first is not None:
            trains = first not in declared.frozen
            if parameter.requires_grad and not trains:
                on.append(name)
            elif not parameter.requires_grad and trains and can_train(parameter):
                off.append(name)
        elif parameter.requires_grad and inside and name.startswith(inside):
            new.append(name)
    groups: dict[tuple[str, str], list[str]] = {}
    rules = (
        (on, "requires a gradient although it was declared frozen", "set it to True"),
        (off, "requires no gradient although it was declared trainable", "set it to False"),
        (new, "is a new trainable parameter in a frozen module", "added it after the fit began"),
    )
    for names, what, did in rules:
        for name in names:
            cause = f"Other code {did}{_when(flips.get(name), who)}"
            if _is_another(name, before, now):
                cause = "It is another Parameter than at the fit's start, made with this flag"
            groups.setdefault((what, cause), []).append(name)
    return [
        Seen(
            "flag-changed",
            tuple(names),
            f"{some(names)} {what}",
            f"{cause}{_together(now, names) if cause.startswith('Other code set') else ''}.",
            "Let one place decide: name it in `trainable`, `backbone` or the schedule.",
            since=min((flips[name].at for name in names if name in flips), default=None),
        )
        for (what, cause), names in groups.items()
    ]


def _is_another(name: str, before: ModelIndex, now: ModelIndex) -> bool:
    known = before.canonical.get(name)
    return known is not None and before.parameters[known] is not now.parameters[name]


def _when(flip: Flip | None, who: Who) -> str:
    return "" if flip is None else when(flip.after, flip.before, who)


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


def awake(
    before: ModelIndex,
    now: ModelIndex,
    quiet: Iterable[str],
    modes: Mapping[str, Flip],
    who: Who,
) -> list[Seen]:
    """Frozen modules that left eval mode, or whose place another module has taken.

    Args:
        before: the model when it was declared.
        now: the model as it is.
        quiet: paths of the modules that should be in eval mode.
        modes: when each mode was seen to change.
        who: says which code runs between two looks.
    """
    up = [path for path in quiet if path in now.modules and now.modules[path].training]
    same = [path for path in up if now.modules[path] is before.modules[path]]
    known = set(same)
    fresh = [path for path in up if path not in known and not _trains(now, path)]
    if all(path in modes and modes[path].early for path in same) and not any(
        minds_its_mode(now.modules[path]) for path in same
    ):
        same = []  # `self.train()` in `on_train_start`, because `from_pretrained` ends in eval mode
    return _left_eval(now, same, modes, who) + _came_in_train_mode(now, fresh)


def _trains(index: ModelIndex, path: str) -> bool:
    return any(index.parameters[n].requires_grad for n in index.within(index.modules[path]))


def _left_eval(now: ModelIndex, up: list[str], modes: Mapping[str, Flip], who: Who) -> list[Seen]:
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


def _came_in_train_mode(now: ModelIndex, paths: list[str]) -> list[Seen]:
    if not paths:
        return []
    kinds = some(sorted({type(now.modules[path]).__name__ for path in paths}))
    return [
        Seen(
            "mode-changed",
            tuple(paths),
            f"{some(paths)} is in train mode although frozen",
            f"The module there is another one than at the fit's start ({kinds}), and came in train "
            "mode.",
            "Convert modules before the fit (`setup`, `configure_model`).",
        )
    ]


def lively(index: ModelIndex) -> tuple[str, ...]:
    """Paths of modules that train and are in train mode, and that behave otherwise in eval mode.

    A dropout or batch-norm alone may be put to sleep on purpose, now or later; a module around
    them may not.
    """
    restless = [
        path
        for path, module in index.modules.items()
        if is_batch_norm(module) or (is_dropout(module) and bool(getattr(module, "p", None)))
    ]
    around: set[str] = set()
    for path in restless:
        while path:
            path = path.rpartition(".")[0]
            around.add(path)
    return tuple(
        path
        for path, module in index.modules.items()
        if path in around and module.training and _trains(index, path)
    )


def fell_asleep(now: ModelIndex, lively: Iterable[str]) -> list[Seen]:
    """Modules that train and left train mode during the fit.

    Args:
        now: the model as it is.
        lively: paths of those that were in train mode before the first batch.
    """
    down = [
        path
        for path in lively
        if path in now.modules and not now.modules[path].training and _trains(now, path)
    ]
    if not down:
        return []
    chosen = set(down)
    tops = sorted(p for p in down if p.rpartition(".")[0] not in chosen or not p)
    return [
        Seen(
            "mode-changed",
            tuple(tops),
            f"{some([top or 'the model' for top in tops])} left train mode although it trains",
            "Some code called `eval()` on it or on a module around it, and nobody `train()`: its "
            "dropout is off and its batch-norm statistics stand still.",
            "Put it back with `train()`; for a look at the model in eval mode, restore the mode "
            "behind it.",
        )
    ]


def by_batch(now: ModelIndex, still: Iterable[str]) -> list[Seen]:
    """Frozen batch-norms that were told not to keep statistics: then they use each batch's own.

    Lightning's `BaseFinetuning.freeze(train_bn=False)` does that to a module in train mode
    (speediedan/finetuning-scheduler issue 13).
    """
    paths = [
        path
        for path in still
        if path in now.modules and is_batch_norm(now.modules[path]) and _by_batch(now, path)
    ]
    if not paths:
        return []
    return [
        Seen(
            "mode-changed",
            tuple(paths),
            f"{some(paths)} is frozen, but normalises by each batch",
            "`track_running_stats` was set to False while it is in train mode: its statistics "
            "stay, and aren't used until it is in eval mode.",
            "Leave `track_running_stats` alone and put it in eval mode, as `FreezeBackbone` does.",
        )
    ]


def _by_batch(now: ModelIndex, path: str) -> bool:
    module = now.modules[path]
    keeps = getattr(module, "track_running_stats", True)
    return module.training and not keeps and getattr(module, "running_mean", None) is not None
