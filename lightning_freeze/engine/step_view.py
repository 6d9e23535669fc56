"""The optimizer's step at each tensor's own rate; outside of a step its groups are the user's.

A step pre-hook hands the step to a stand-in: an instance of a subclass made for the purpose, which
shares the optimizer's `__dict__` and shows other groups, the user's split by factor, without empty
ones. The optimizer itself is never changed, so an exception leaves nothing to put back.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MethodType, new_class
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

LISTS = ("params", "param_names")

# lists of one value per group that optimizers keep beside their groups, as AdaBound's `base_lrs`
_PER_GROUP = re.compile(r"(lrs?|momentums?|base_values)$")


@dataclass
class _Part:
    """What the step sees of one of the user's groups: the tensors of one factor.

    Attributes:
        place: of the user's group.
        factor: on its learning rate.
        first: whether it is the group's first part, whose options go back to the user's group.
        options: the group that the step sees.
        taken: the user's options as they were taken last.
        rate: the learning rate that was handed to the step.
    """

    place: int
    factor: float
    first: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    taken: dict[str, Any] = field(default_factory=dict)
    rate: Any = None

    def take(self, group: Mapping[str, Any], lists: Mapping[str, Any]) -> None:
        """Take over what the user has set since the last step, the rate times the factor."""
        for key, value in group.items():
            if key == "lr" and self.factor != 1.0:
                self._scale(value)
            elif key not in LISTS and (key not in self.taken or self.taken[key] is not value):
                # what is changed in place must not be shared with another part
                apart = not self.first and isinstance(value, (Tensor, list, dict))
                self.options[key] = copy.deepcopy(value) if apart else value
                self.taken[key] = value
        self.options.update(lists)
        self.rate = self.options.get("lr")

    def _scale(self, lr: Any) -> None:
        known = self.options.get("lr")
        if isinstance(lr, Tensor) and isinstance(known, Tensor):
            torch.mul(lr, self.factor, out=known)  # a captured graph keeps its address
        else:
            self.options["lr"] = lr * self.factor
        self.taken["lr"] = lr

    def give(self, group: dict[str, Any]) -> None:
        """Hand what the optimizer wrote to its group in the step on to the user's group."""
        for key, value in self.options.items() if self.first else ():
            if key == "lr" and self.factor != 1.0:
                if value is not self.rate:
                    group[key] = value / self.factor
            elif key not in LISTS and (key not in self.taken or self.taken[key] is not value):
                group[key] = value
        self.taken.update((key, value) for key, value in group.items() if key not in LISTS)

    def own(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The options that the optimizer has made other than the user's."""
        return {
            key: copy.deepcopy(value)
            for key, value in self.options.items()
            if key not in (*LISTS, "lr")
            and self.taken.get(key) is group.get(key)
            and value is not self.taken.get(key)
        }


class StepView:
    """Has one optimizer step on groups in which each tensor has its own rate.

    Attributes:
        optimizer: the user's.
        steps: how many steps have gone through it.
        groups: what the stand-in shows as its `param_groups`.
    """

    def __init__(
        self, optimizer: Optimizer, factors: Mapping[int, float], settle: Callable[[], None]
    ) -> None:
        """Hook into an optimizer.

        Args:
            optimizer: of torch's kind; it runs step hooks.
            factors: id of a parameter -> factor on its learning rate, 1.0 where absent.
            settle: called before each step; brings the `params` lists into order.
        """
        self.optimizer = optimizer
        self.steps = 0
        self.groups: list[dict[str, Any]] = []
        self._factors = factors
        self._settle = settle
        self._places: list[int] = []
        self._split_before: dict[int, tuple[list[Any], list[tuple[float, dict[str, Any]]]]] = {}
        self._parts: dict[tuple[int, float], _Part] = {}
        self._saved: dict[tuple[int, float], Mapping[str, Any]] = {}
        self._stand_in = self._make_stand_in()
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def stop(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _make_stand_in(self) -> Any:
        optimizer, view = self.optimizer, self
        kind: Any = type(optimizer)

        def shown(stand_in: Any, name: str) -> Any:
            """An attribute of the optimizer as the step has to see it."""
            value = vars(stand_in)[name]
            if isinstance(value, MethodType):
                return MethodType(value.__func__, stand_in)
            return [value[place] for place in view._places]

        body: dict[str, Any] = {
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            # `super(self.__class__, self)` must not find this subclass; nothing is freed twice
            "__class__": property(lambda _: kind),
            "__del__": lambda _: None,
            "param_groups": property(
                lambda _: view.groups, lambda _, groups: setattr(view, "groups", groups)
            ),
        }
        for name, value in vars(optimizer).items():
            bound = isinstance(value, MethodType) and value.__self__ is optimizer
            several = isinstance(value, list) and len(value) == len(optimizer.param_groups)
            if bound or (several and _PER_GROUP.search(name)):
                body[name] = property(partial(shown, name=name))
        made: Any = object.__new__(new_class(kind.__name__, (kind,), {}, lambda s: s.update(body)))
        made.__dict__ = vars(optimizer)  # the same dict: what the step sets is set
        return made

    def _split(self, place: int, group: Mapping[str, Any]) -> list[tuple[float, dict[str, Any]]]:
        """A group's lists by factor, the largest first; worked out anew when its list changes."""
        params: Sequence[Tensor] = group["params"]
        known = self._split_before.get(place)
        if (
            known is None
            or len(known[0]) != len(params)
            or any(map(operator.is_not, known[0], params))
        ):
            members: dict[float, list[int]] = {}
            for i, parameter in enumerate(params):
                members.setdefault(self._factors.get(id(parameter), 1.0), []).append(i)
            lists = [key for key in LISTS if key in group]
            parts = [
                (factor, {key: [group[key][i] for i in members[factor]] for key in lists})
                for factor in sorted(members, reverse=True)
            ]
            known = self._split_before[place] = list(params), parts
        return known[1]

    def _is_whole(self, place: int, group: Mapping[str, Any]) -> bool:
        """Whether the step can be shown the user's own group."""
        parts = self._split(place, group)
        return len(parts) == 1 and parts[0][0] == 1.0

    def _take(self) -> None:
        """The groups that the step sees, with the user's present options."""
        before, self._parts = self._parts, {}
        self.groups, self._places = [], []
        for place, group in enumerate(self.optimizer.param_groups):
            if self._is_whole(place, group):
                self.groups.append(group)
                self._places.append(place)
                continue
            for number, (factor, lists) in enumerate(self._split(place, group)):
                part = before.get((place, factor)) or _Part(place, factor)
                part.first = number == 0
                part.take(group, lists)
                if (place, factor) not in before:
                    part.options.update(self._saved.get((place, factor), {}))
                self._parts[place, factor] = part
                self.groups.append(part.options)
                self._places.append(place)
        self._saved = {}  # what comes back later begins with the user's options
        if not self.groups:  # many optimizers look at their first group before anything else
            first = self.optimizer.param_groups[0]
            nothing: dict[str, Any] = {key: [] for key in LISTS if key in first}
            self.groups.append({**first, **nothing})
            self._places.append(0)

    @_disable_dynamo
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if optimizer is self._stand_in:  # a base class's `step`, within the step
            return None
        self.steps += 1
        self._settle()
        if all(self._is_whole(place, group) for place, group in enumerate(optimizer.param_groups)):
            self._parts, self._saved = {}, {}
            return None
        self._take()

        def closure_then_take(closure: Callable[..., Any]) -> Callable[..., Any]:
            def call(*given: Any, **named: Any) -> Any:
                result = closure(*given, **named)
                self._take()  # Lightning runs `training_step` in it, and users set options there
                return result

            return call

        def wrap(value: Any) -> Any:
            return closure_then_take(value) if callable(value) else value

        return (self._stand_in, *map(wrap, args[1:])), {k: wrap(v) for k, v in kwargs.items()}

    @_disable_dynamo
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is self._stand_in or args[0] is not self._stand_in:
            return
        for (place, _), part in self._parts.items():
            part.give(optimizer.param_groups[place])

    def state(self) -> list[tuple[int, float, dict[str, Any]]]:
        """What differs between the parts of a group, for a checkpoint: place, factor, options."""
        groups = self.optimizer.param_groups
        found = [(p.place, p.factor, p.own(groups[p.place])) for p in self._parts.values()]
        return [(place, factor, options) for place, factor, options in found if options]

    def restore(self, saved: Sequence[tuple[int, float, Mapping[str, Any]]]) -> None:
        """Begin the next step with the parts' own options from a checkpoint."""
        self._parts = {}
        self._saved = {(place, factor): options for place, factor, options in saved}


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(one) == len(other) and all(map(operator.is_, one, other))
