"""Who holds what: trainable tensors without an optimizer, groups and schedulers that disagree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_freeze.audit.findings import Seen
from lightning_freeze.model.index import ModelIndex, shape_of, some
from lightning_freeze.model.layer_groups import LayerGroup


def check_optimizers(
    index: ModelIndex,
    trainable: Iterable[str],
    optimizers: Sequence[Optimizer],
    schedulers: Iterable[Any],
    expected: Callable[[str], bool] = lambda name: True,
    *,
    groups: Iterable[LayerGroup] = (),
    started: ModelIndex | None = None,
    once_held: frozenset[str] = frozenset(),
    once_frozen: frozenset[str] = frozenset(),
) -> list[Seen]:
    """What trains but can't: nothing trainable, in no optimizer; scheduler lists that don't fit.

    Args:
        index: the model.
        trainable: names that are declared to train now.
        optimizers: of the trainer.
        schedulers: of the trainer.
        expected: whether a name's absence from the optimizers is a fault; parameters may be left
            out on purpose.
        groups: layer groups; what is missing is told once for each.
        started: the model at the fit's start, to tell what came later.
        once_held: names that an optimizer held at the fit's start.
        once_frozen: names that were frozen then.
    """
    names = list(trainable)
    seen: list[Seen] = []
    if not names:
        seen.append(
            Seen(
                "nothing-trainable",
                (),
                "nothing in the model trains",
                f"All {len(index.parameters)} parameters are frozen.",
                "Leave at least the head trainable.",
            )
        )
    held = held_by(optimizers)
    missing = [n for n in names if id(index.parameters[n]) not in held and expected(n)]
    if missing and optimizers:
        then = _Then(started, once_held, once_frozen)
        seen += _missing(index, missing, optimizers, list(groups), then)
    seen += _twice(index, optimizers)
    return seen + _schedulers(optimizers, schedulers)


def held_by(optimizers: Iterable[Optimizer]) -> dict[int, str]:
    """Id of a parameter -> class of the optimizer that holds it."""
    return {
        id(parameter): type(optimizer).__name__
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@dataclass(frozen=True)
class _Then:
    """How it was when the fit began: the model, what was held, what was frozen."""

    model: ModelIndex | None
    held: frozenset[str]
    frozen: frozenset[str]


def _missing(
    index: ModelIndex,
    missing: Sequence[str],
    optimizers: Sequence[Optimizer],
    groups: Sequence[LayerGroup],
    then: _Then,
) -> list[Seen]:
    orphans = _orphans(index, optimizers)
    group_of = {name: group.name for group in groups for name in group.parameters}
    found: dict[tuple[str, tuple[str, str]], list[str]] = {}
    for name in missing:
        why = _why_missing(name, index, orphans, then)
        found.setdefault((group_of.get(name, ""), why), []).append(name)
    return [
        Seen(
            "not-in-optimizer",
            tuple(names),
            f"{some(names)} should train but is in no optimizer",
            *why,
        )
        for (_, why), names in found.items()
    ]


def _why_missing(
    name: str,
    index: ModelIndex,
    orphans: Mapping[tuple[int, ...], tuple[str, bool]],
    then: _Then,
) -> tuple[str, str]:
    known = None
    if then.model is not None and name in then.model.canonical:
        known = then.model.parameters[then.model.canonical[name]]
    if known is not None and known is not index.parameters[name]:
        return (
            "It is another Parameter than when the fit began: optimizers were given the old one.",
            "Replace or resize before the fit, so that `configure_optimizers` sees it.",
        )
    orphan = orphans.get(shape_of(index.parameters[name]))
    if orphan is not None:
        kind, on_meta = orphan
        what = "one on the meta device" if on_meta else "another"
        return (
            f"{kind} holds {what} of its shape that isn't in the model: it was made before this "
            "Parameter was, or from another model.",
            "Make the optimizer from `self.parameters()` in `configure_optimizers`, after anything "
            "that replaces Parameters.",
        )
    if then.model is not None and name not in then.model.canonical:
        return (
            "It was added to the model after the optimizer was made.",
            "Add it before the fit (`setup`, `configure_model`), so that `configure_optimizers` "
            "sees it.",
        )
    if name in then.held:
        return (
            "An optimizer held it when the fit began; its group was emptied or removed since.",
            "Don't change `param_groups` by hand during a fit.",
        )
    if name in then.frozen:
        return (
            "It was frozen when the fit began and was unfrozen since; `configure_optimizers` took "
            "only what required a gradient then, or it was dropped with its group.",
            "Give the optimizer all parameters that will ever train, or unfreeze with "
            "`GradualUnfreeze`.",
        )
    return (
        "`configure_optimizers` leaves it out.",
        "Give the optimizer all parameters that will ever train.",
    )


def _orphans(
    index: ModelIndex, optimizers: Sequence[Optimizer]
) -> dict[tuple[int, ...], tuple[str, bool]]:
    """Shape of what an optimizer holds and the model doesn't have -> class, whether on meta."""
    return {
        shape_of(parameter): (type(optimizer).__name__, parameter.device.type == "meta")
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) not in index.name_of
    }


def _twice(index: ModelIndex, optimizers: Sequence[Optimizer]) -> list[Seen]:
    """A tensor in two groups of one optimizer is stepped twice."""
    found = []
    for optimizer in optimizers:
        ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
        if len(ids) == len(set(ids)):
            continue
        again = {key for key, count in Counter(ids).items() if count > 1}
        names = [name for key, name in index.name_of.items() if key in again]
        kind = type(optimizer).__name__
        found.append(
            Seen(
                "scheduler-mismatch",
                tuple(names),
                f"{some(names)} is in more than one parameter group of {kind}, which steps it "
                "more than once",
                "A group was changed by hand, or joined from two sources.",
                "Put each parameter into one group.",
            )
        )
    return found


def _schedulers(optimizers: Sequence[Optimizer], schedulers: Iterable[Any]) -> list[Seen]:
    found = []
    for scheduler in _with_inner(schedulers):
        optimizer = getattr(scheduler, "optimizer", None)
        lists = getattr(scheduler, "base_lrs", None) or getattr(scheduler, "min_lrs", None)
        lists = lists or getattr(scheduler, "base_values", None)  # timm's
        size = len(lists or ())
        groups = getattr(optimizer, "param_groups", None)
        if groups is None or not size or size == len(groups):
            continue
        kind = type(scheduler).__name__
        did = "added" if len(groups) > size else "removed"
        found.append(
            Seen(
                "scheduler-mismatch",
                (kind,),
                f"{kind} knows {size} parameter groups, its optimizer has {len(groups)}",
                f"A group was {did} after the scheduler was made.",
                "Don't call `add_param_group` during a fit: it breaks schedulers, or leaves the "
                "new group's learning rate as it is.",
            )
        )
    return found


def _with_inner(schedulers: Iterable[Any]) -> Iterator[Any]:
    """Schedulers and those that they chain."""
    for scheduler in schedulers:
        yield scheduler
        yield from _with_inner(getattr(scheduler, "_schedulers", None) or ())


def hidden(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[Seen]:
    """Modules in plain lists and dicts: torch doesn't see them, so no optimizer is given them.

    Only what has a gradient is told of: a teacher may be hidden like that on purpose.
    """
    index = ModelIndex.of(model)
    held = held_by(optimizers)
    found = []
    for path, module in index.modules.items():
        for key, value in vars(module).items():
            if key.startswith("_") and key in _OF_TORCH:
                continue
            names = [
                f"{path}.{key}{place}.{name}".lstrip(".")
                for place, inner in _inside(value)
                for name, parameter in inner.named_parameters()
                if parameter.grad is not None
                and id(parameter) not in index.name_of
                and id(parameter) not in held
            ]
            if names:
                found.append(
                    Seen(
                        "not-in-optimizer",
                        tuple(names),
                        f"{some(names)} gets gradients but is in no optimizer",
                        f"`{key}` is a plain {type(value).__name__}: torch doesn't register the "
                        "modules in it, so `parameters()`, `state_dict()` and `to()` leave them "
                        "out.",
                        "Use `nn.ModuleList` or `nn.ModuleDict`.",
                    )
                )
    return found


_OF_TORCH = frozenset(vars(nn.Module()))


def _inside(value: Any) -> Iterator[tuple[str, nn.Module]]:
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif isinstance(value, dict):
        items = value.items()
    for key, item in items:
        if isinstance(item, nn.Module):
            yield f"[{key!r}]", item
