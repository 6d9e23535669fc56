"""The only writer of optimizer groups and scheduler lists.

A user's parameter groups are split once, per layer group. From then on a frozen group's `params`
list is empty, and freezing or unfreezing only empties and fills lists: the number of groups never
changes, so every scheduler goes on working and every checkpoint has one shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import compress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_freeze.errors import ArgumentError, UnsupportedError
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.report.labels import Names

FACTOR = "lr_factor"
USER_LR = "user_lr"
_OURS = ("name", FACTOR, USER_LR)

# lists that hold one value per parameter group, in torch's, transformers' and timm's schedulers
_PER_GROUP = re.compile(r"(lrs?|momentums?|lambdas|base_values)$")

_REFUSED = {
    "LBFGS": "it takes one parameter group, keeps a list of its own, and moves what was frozen",
    "ZeroRedundancyOptimizer": "it shards a parameter list that it fixed when it was made",
    "DeepSpeedZeroOptimizer": "it flattens the parameters when it is made",
}


def check_supported(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers whose groups can't be split.

    Raises:
        UnsupportedError: with the reason and what to use instead.
    """
    for optimizer in optimizers:
        for base in type(optimizer).__mro__:
            if base.__name__ in _REFUSED:
                raise UnsupportedError(
                    f"`{type(optimizer).__name__}` can't be used with layers that freeze or "
                    f"unfreeze: {_REFUSED[base.__name__]}. Use AdamW, SGD or another optimizer "
                    "with parameter groups, or freeze by hand before the fit and leave the "
                    "freezing callbacks out."
                )


@dataclass
class _Split:
    """How one optimizer was split, in terms of positions: load_state_dict replaces the dicts."""

    schedulers: list[Any]
    origin: list[int]
    full: list[list[nn.Parameter]]
    names: list[list[str] | None]
    whole: list[list[nn.Parameter]]
    whole_names: list[list[str] | None]
    had_name: list[Any]


_splits: WeakKeyDictionary[Optimizer, _Split] = WeakKeyDictionary()


class OptimizerGroups:
    """The optimizers of one fit, split per layer group.

    Attributes:
        optimizers: as the trainer holds them.
        held: names of the model's parameters that any of them holds, frozen or not.
    """

    def __init__(
        self,
        index: ModelIndex,
        optimizers: Sequence[Optimizer],
        schedulers: Iterable[Any],
        layer_group: Mapping[str, str],
        lr_scale: Mapping[str, float],
    ) -> None:
        """Split the groups.

        Args:
            index: names the parameters; what it doesn't know is never frozen.
            optimizers: they are changed in place.
            schedulers: of any of the optimizers; their per-group lists are extended to match.
            layer_group: parameter name -> name of the group it freezes with.
            lr_scale: parameter name -> factor on the learning rate, 1.0 where absent.

        Raises:
            UnsupportedError: an optimizer can't be split; nothing is changed then.
        """
        check_supported(optimizers)
        self.index = index
        self.optimizers = list(optimizers)
        listed = list(schedulers)
        self.held = frozenset(
            index.name_of[id(parameter)]
            for optimizer in optimizers
            for group in whole_groups(optimizer)
            for parameter in group
            if id(parameter) in index.name_of
        )

        def key(parameter: nn.Parameter) -> tuple[str, float]:
            name = index.name_of.get(id(parameter), "")
            return layer_group.get(name, "other"), lr_scale.get(name, 1.0)

        for optimizer in self.optimizers:
            _join(optimizer)
            _check_scalable(optimizer, key)
        for optimizer in self.optimizers:
            _split(optimizer, [s for s in listed if _optimizer_of(s) is optimizer], key)

    def sync(self, frozen: frozenset[str]) -> None:
        """Fill and empty the groups, and drop the optimizer state of what is frozen.

        Args:
            frozen: names of the parameters that don't train from now on.
        """
        name_of = self.index.name_of
        for optimizer in self.optimizers:
            split = _splits[optimizer]
            for group, params, names in zip(optimizer.param_groups, split.full, split.names):
                trains = [name_of.get(id(p)) not in frozen for p in params]
                group["params"][:] = compress(params, trains)
                if names is not None:
                    group["param_names"] = list(compress(names, trains))
                if optimizer.state and not all(trains):
                    for parameter, kept in zip(params, trains):
                        if not kept:
                            optimizer.state.pop(parameter, None)

    @contextmanager
    def without_empty(self) -> Iterator[None]:
        """Inside, optimizers have only groups that hold something; what is loaded there stays."""
        whole = [list(optimizer.param_groups) for optimizer in self.optimizers]
        for optimizer in self.optimizers:
            optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
        try:
            yield
        finally:
            for optimizer, groups in zip(self.optimizers, whole):
                held = iter(optimizer.param_groups)
                optimizer.param_groups = [next(held) if g["params"] else g for g in groups]

    def idle(self) -> list[dict[int, dict[str, Any]]]:
        """The options of the empty groups of each optimizer, by position, as plain values."""
        return [
            {
                position: {key: _plain(value) for key, value in group.items() if key != "params"}
                for position, group in enumerate(optimizer.param_groups)
                if not group["params"]
            }
            for optimizer in self.optimizers
        ]

    def restore_idle(self, saved: Sequence[Mapping[int, Mapping[str, Any]]]) -> None:
        """Give empty groups back the options that they had."""
        for optimizer, groups in zip(self.optimizers, saved):
            for position, options in groups.items():
                group = optimizer.param_groups[position]
                for key, value in options.items():
                    if isinstance(group.get(key), Tensor):
                        _assign(group, key, value)
                    elif key in group:
                        group[key] = value

    def origins(self) -> list[list[int]]:
        """The place of the user's group that each group of each optimizer is a part of."""
        return [list(_splits[optimizer].origin) for optimizer in self.optimizers]


def listed(given: Any) -> list[Optimizer]:
    """Optimizers as people hand them over: one, several, or what `configure_optimizers` returns.

    Args:
        given: an optimizer, a dict with "optimizer" in it, any nesting of lists and tuples of
            these, or None. Schedulers are passed over.

    Raises:
        ArgumentError: there is something else among them.

    Example:
        >>> sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> listed(([sgd], [])) == listed({"optimizer": sgd, "lr_scheduler": None}) == [sgd]
        True
    """
    if given is None:
        return []
    if isinstance(given, Optimizer) or hasattr(given, "param_groups"):
        inner = getattr(given, "optimizer", None)  # Lightning's own wrapper
        return [inner if isinstance(inner, Optimizer) else given]
    if isinstance(given, Mapping) and "optimizer" in given:
        return listed(given["optimizer"])
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        if hasattr(given, "step") and hasattr(given, "last_epoch"):
            return []
        raise ArgumentError(
            f"Expected optimizers, got {type(given).__name__}. Give one, a list of them, or what "
            "`configure_optimizers()` returns."
        )
    if isinstance(given, (list, tuple)) and any(_is_scheduler(item) for item in given):
        given = [item for item in given if not _is_scheduler(item)]
    return [optimizer for item in given for optimizer in listed(item)]


def _is_scheduler(item: Any) -> bool:
    inner = item.get("scheduler", item) if isinstance(item, Mapping) else item
    return (
        hasattr(inner, "optimizer")
        and hasattr(inner, "step")
        and not hasattr(inner, "param_groups")
    )


def forget(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Drop the state that optimizers keep of some parameters, such as momentum."""
    listed = list(parameters)
    for optimizer in optimizers:
        for parameter in listed:
            optimizer.state.pop(parameter, None)


def learning_rates(index: ModelIndex, optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """Parameter name -> learning rate now, for what any optimizer holds, frozen or not."""
    found: dict[int, float] = {}
    for optimizer in optimizers:
        split = _splits.get(optimizer)
        for position, group in enumerate(optimizer.param_groups):
            known = split is not None and position < len(split.full)
            params = split.full[position] if split is not None and known else group["params"]
            if group.get("lr") is not None:
                found.update(dict.fromkeys(map(id, params), float(group["lr"])))
    return {name: found[id(p)] for name, p in index.parameters.items() if id(p) in found}


def whole_groups(optimizer: Optimizer) -> list[list[nn.Parameter]]:
    """The parameters of each group as the user made it, with what is frozen now."""
    split = _splits.get(optimizer)
    return [group["params"] for group in optimizer.param_groups] if split is None else split.whole


def release(index: ModelIndex) -> None:
    """Before a fit: give optimizers that an earlier fit split their user's groups back."""
    for optimizer in list(_splits):
        if any(id(p) in index.name_of for params in _splits[optimizer].whole for p in params):
            _join(optimizer)


def _optimizer_of(scheduler: Any) -> Any:
    return getattr(scheduler, "optimizer", None)


def _check_scalable(optimizer: Optimizer, key: Callable[[nn.Parameter], tuple[str, float]]) -> None:
    for group in optimizer.param_groups:
        if group.get("lr") is None and any(key(p)[1] != 1.0 for p in group["params"]):
            raise UnsupportedError(
                f"`{type(optimizer).__name__}` chooses its learning rate itself (`lr=None`), so "
                "a factor on it has no meaning. Give it an `lr`, or leave `lr_decay` and "
                "`lr_scale` at 1.0."
            )


def _split(
    optimizer: Optimizer,
    schedulers: list[Any],
    key: Callable[[nn.Parameter], tuple[str, float]],
) -> None:
    split = _Split(schedulers, [], [], [], [], [], [])
    groups: list[dict[str, Any]] = []
    several = len(optimizer.param_groups) > 1
    for position, group in enumerate(optimizer.param_groups):
        params = list(group["params"])
        names = list(group["param_names"]) if "param_names" in group else None
        split.whole.append(params)
        split.whole_names.append(names)
        split.had_name.append(group.get("name"))
        buckets: dict[tuple[str, float], list[int]] = {}
        for i, parameter in enumerate(params):
            buckets.setdefault(key(parameter), []).append(i)
        for (label, factor), members in (buckets or {("empty", 1.0): []}).items():
            fresh = {k: _copy(v) for k, v in group.items() if k not in ("params", "param_names")}
            fresh["params"] = [params[i] for i in members]
            if names is not None:
                fresh["param_names"] = [names[i] for i in members]
            suffix = group.get("name", position if several else None)
            fresh["name"] = label if suffix is None else f"{label}/{suffix}"
            if factor != 1.0:
                fresh[FACTOR] = factor
                fresh[USER_LR] = _copy(fresh["lr"])
                fresh["lr"] = fresh["lr"] * factor
            groups.append(fresh)
            split.origin.append(position)
            split.full.append(list(fresh["params"]))
            split.names.append(list(fresh["param_names"]) if names is not None else None)
    _unique_names(groups)
    old = len(optimizer.param_groups)
    optimizer.param_groups[:] = groups
    scaled = any(FACTOR in group for group in groups)
    for scheduler in schedulers:
        _regroup(scheduler, old, split.origin)
        if scaled:
            _scale(scheduler)
    _splits[optimizer] = split


def _unique_names(groups: list[dict[str, Any]]) -> None:
    """LearningRateMonitor refuses two groups of one name."""
    give = Names()
    for group in groups:
        group["name"] = give(str(group["name"]))


def _join(optimizer: Optimizer) -> None:
    """Undo `_split`: the user's own groups, with their present options."""
    split = _splits.pop(optimizer, None)
    if split is None:
        return
    groups: list[dict[str, Any]] = []
    places: dict[int, int] = {}
    for place, position in enumerate(split.origin):
        places.setdefault(position, place)
    first = [places[position] for position in range(len(split.whole))]
    for position, params in enumerate(split.whole):
        group = dict(optimizer.param_groups[first[position]])
        group["params"] = list(params)
        if split.whole_names[position] is not None:
            group["param_names"] = split.whole_names[position]
        if USER_LR in group:
            group["lr"] = group[USER_LR]
        for name in _OURS:
            group.pop(name, None)
        if split.had_name[position] is not None:
            group["name"] = split.had_name[position]
        groups.append(group)
    for scheduler in split.schedulers:
        _unscale(scheduler)
        _regroup(scheduler, len(split.origin), first)
    optimizer.param_groups[: len(split.origin)] = groups


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return value


def _copy(value: Any) -> Any:
    # a tensor lr is written in place: two groups must not share one
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if type(value) is list else value


def _regroup(scheduler: Any, old: int, origin: Sequence[int]) -> None:
    """Give a scheduler's per-group lists, and those of schedulers inside it, one value a group."""
    for attribute, value in vars(scheduler).items():
        if isinstance(value, list) and len(value) == old and _PER_GROUP.search(attribute):
            setattr(scheduler, attribute, [_copy(value[position]) for position in origin])
    for inner in getattr(scheduler, "_schedulers", None) or ():
        _regroup(inner, old, origin)


@contextmanager
def _user_lrs(optimizer: Optimizer) -> Iterator[None]:
    """Inside, groups have the lr that the user's scheduler computes; outside, that times a factor.

    A scheduler that derives the next lr from the present one, or adds a floor to it, is exact only
    on the lr that it wrote itself.
    """
    scaled = [group for group in optimizer.param_groups if FACTOR in group]
    for group in scaled:
        untouched = bool(group["lr"] == group[USER_LR] * group[FACTOR])
        _assign(group, "lr", group[USER_LR] if untouched else group["lr"] / group[FACTOR])
    try:
        yield
    finally:
        for group in scaled:
            _assign(group, USER_LR, group["lr"])
            _assign(group, "lr", group["lr"] * group[FACTOR])


def _assign(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group[key], Tensor):
        with torch.no_grad():
            group[key].copy_(torch.as_tensor(value))
    else:
        group[key] = value


@cache
def _scaled_class(kind: Any) -> Any:
    """A scheduler class whose `step` sees the user's lrs.

    The class is swapped rather than the method, since an attribute would go into `state_dict`.
    """

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _user_lrs(self.optimizer):
                result = method(self, *args, **kwargs)
            if hasattr(self, "_last_lr"):
                self._last_lr = [_copy(group["lr"]) for group in self.optimizer.param_groups]
            return result

        return step

    body = {
        name: wrap(getattr(kind, name)) for name in ("step", "step_update") if hasattr(kind, name)
    }
    return type(
        kind.__name__, (kind,), {**body, "__module__": kind.__module__, "_user_class": kind}
    )


def _scale(scheduler: Any) -> None:
    if "_user_class" not in vars(type(scheduler)):
        kind: Any = type(scheduler)
        scheduler.__class__ = _scaled_class(kind)
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [_copy(group["lr"]) for group in scheduler.optimizer.param_groups]


def _unscale(scheduler: Any) -> None:
    if "_user_class" in vars(type(scheduler)):
        scheduler.__class__ = type(scheduler)._user_class
