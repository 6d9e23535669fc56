"""The unfrozen side: does what is to train have an optimizer, gradients, and does it move?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_freeze.audit.baseline import Baseline, Moment
from lightning_freeze.audit.findings import Seen
from lightning_freeze.audit.gradients import Why
from lightning_freeze.audit.numbers import all_zero, local
from lightning_freeze.errors import DiscoveryError
from lightning_freeze.model.index import ModelIndex, shape_of
from lightning_freeze.model.layer_groups import LayerGroup, discover

# a learning rate below this share of the scheduler's full one may be lost in rounding
_WARM = 1e-4


def by_group(groups: Iterable[LayerGroup], names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Layer group -> those of `names` that are in it; groups with none are left out."""
    chosen = set(names)
    found = {g.name: tuple(n for n in g.parameters if n in chosen) for g in groups}
    return {group: members for group, members in found.items() if members}


def without_gradient(
    groups: Iterable[LayerGroup],
    names: Iterable[str],
    steps: int,
    why: Callable[[str], Why],
    severity: str = "error",
) -> list[Seen]:
    """Findings for parameters that waited `steps` steps for a gradient: one a group and cause."""
    found: dict[tuple[str, Why], list[str]] = {}
    for group, members in by_group(groups, names).items():
        for name in members:
            found.setdefault((group, why(name)), []).append(name)
    return [
        Seen(
            "no-gradient",
            tuple(members),
            f"{members[0] if len(members) == 1 else f'{len(members)} tensors of `{group}`'} had "
            f"no gradient {f'for {steps} optimizer steps' if steps > 1 else 'in a step'} although "
            "trainable",
            *reason,
            severity=severity,
        )
        for (group, reason), members in found.items()
    ]


@dataclass(frozen=True)
class Stuck:
    """A parameter that hasn't moved.

    Attributes:
        steps: optimizer steps at a learning rate above zero since it began to train.
        lr: the last such learning rate.
        why: what its gradient said behind the last update; None where nobody looked.
    """

    steps: int
    lr: float
    why: Why | None = None


class Movement:
    """Which parameters that train have moved since they began to.

    It holds no copies, and reads nothing any more once each has moved.
    """

    def __init__(self) -> None:
        self._began = Baseline()
        self._moved: frozenset[str] = frozenset()
        self._steps: dict[tuple[int, int], int] = {}
        self._lrs: dict[tuple[int, int], float] = {}
        self._before: dict[int, dict[tuple[int, int], int]] = {}
        self._looked = 0
        self._reasons: dict[str, Why | None] = {}

    def arm(self, parameters: Mapping[str, nn.Parameter], now: Moment) -> None:
        """Watch these; what is watched already goes on, what isn't among them is forgotten.

        Args:
            parameters: name -> parameter, of what trains now.
            now: epoch and optimizer step.
        """
        self._moved = self._moved.intersection(parameters)
        waiting: list[tuple[str, Any]] = [
            (name, parameter) for name, parameter in parameters.items() if name not in self._moved
        ]
        self._began = Baseline.of(waiting, now, self._began)
        self._before[now[1]] = dict(self._steps)
        waits = {step for _, step in self._began.since}
        self._before = {step: counts for step, counts in self._before.items() if step in waits}
        self._looked = self._most()
        self._reasons = {}

    def step(self, optimizer: Optimizer) -> None:
        """Before each step: at the very beginning of a warm-up nothing is expected to move."""
        for place, group in enumerate(optimizer.param_groups):
            lr = group.get("lr")
            if lr is None or (isinstance(lr, Tensor) and not lr.is_cpu):
                lr = 1.0  # it chooses its own, or to read it would wait for the device
            full = group.get("initial_lr", lr)
            least = 0.0 if isinstance(full, Tensor) else _WARM * float(full)
            if group["params"] and float(lr) > least:
                key = id(optimizer), place
                self._steps[key] = self._steps.get(key, 0) + 1
                self._lrs[key] = float(lr)

    def _most(self) -> int:
        return max(self._steps.values(), default=0)

    def due(self, least: int) -> bool:
        """Whether so many steps have gone by since it was looked at last."""
        return bool(len(self._began)) and self._most() - self._looked >= least

    def note_reasons(self, optimizer: Optimizer) -> None:
        """Behind an update: what gradients say, before a `zero_grad` or a validation clears them.

        Args:
            optimizer: which has just stepped.
        """
        held = {id(p): g.get("lr") for g in optimizer.param_groups for p in g["params"]}
        for position, name in enumerate(self._began.names):
            tensor = self._began.tensor(position)
            if tensor is not None and id(tensor) in held:
                lr = held[id(tensor)]
                self._reasons[name] = _why_unmoved(tensor, optimizer, 1.0 if lr is None else lr)

    def unmoved(self, optimizers: Sequence[Optimizer]) -> dict[str, Stuck]:
        """What hasn't moved, by name; forgets what has."""
        self._looked = self._most()
        reasons, self._reasons = self._reasons, {}
        moved = set(self._began.changed())
        self._moved = self._moved.union(self._began.names[position] for position in moved)
        left = [p for p in range(len(self._began)) if p not in moved]
        kept = [(self._began.names[p], self._began.tensor(p)) for p in left]
        places: Any = [(name, tensor) for name, tensor in kept if tensor is not None]
        self._began = Baseline.of(places, (0, 0), self._began)
        if not places:
            return {}
        group_of = {
            id(parameter): (id(optimizer), place)
            for optimizer in optimizers
            for place, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        found = {}
        for (name, tensor), (_, began) in zip(places, self._began.since):
            key = group_of.get(id(tensor))
            if key is not None:
                before = self._before.get(began, {}).get(key, 0)
                steps, lr = self._steps.get(key, 0) - before, self._lrs.get(key, 0.0)
                found[name] = Stuck(steps, lr, reasons.get(name))
        return found


def not_moved(
    groups: Iterable[LayerGroup],
    parameters: Mapping[str, nn.Parameter],
    unmoved: Mapping[str, Stuck],
    optimizers: Sequence[Optimizer],
    least: int,
) -> list[Seen]:
    """Parameters that have gradients and yet don't move: one finding a layer group and cause.

    An update that is lost in rounding is told of only if it happens to a whole layer group: that
    is a learning rate too small for a precision. A single tensor may have a gradient near zero by
    nature, such as the bias of attention's keys; and vectors may have one of exactly zero, such as
    the last bias of a reward model, whose loss is a difference of two outputs.

    Args:
        groups: the layer groups.
        parameters: name -> parameter.
        unmoved: what hasn't moved, of those that have had a gradient.
        optimizers: of the loop.
        least: steps at a learning rate above zero after which a parameter should have moved.
    """
    held = {
        id(parameter): optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    seen = []
    for group in groups:
        trained = [n for n in group.parameters if id(parameters[n]) in held]
        stuck: dict[Why, list[str]] = {}
        for name in trained:
            if name not in unmoved or unmoved[name].steps < least:
                continue
            parameter = parameters[name]
            lr = unmoved[name].lr
            why = unmoved[name].why or _why_unmoved(parameter, held[id(parameter)], lr)
            if why is not None:
                stuck.setdefault(why, []).append(name)
        for why, names in stuck.items():
            vectors = all(parameters[name].ndim < 2 for name in names)
            if len(names) < len(trained) and (why is _ROUNDED or (why is _ZERO and vectors)):
                continue
            whole = len(names) == len(trained)
            what = (
                f"`{group.name}` has gradients, but none of its {len(names)} tensors has moved"
                if whole
                else f"{', '.join(names)} of `{group.name}` has gradients, but hasn't moved"
            )
            seen.append(Seen("not-updated", tuple(names), what, *why))
    return seen


def never_stepped(
    groups: Iterable[LayerGroup], names: Iterable[str], batches: int, severity: str
) -> list[Seen]:
    """No optimizer has stepped in so many batches: one finding a layer group.

    Args:
        groups: the layer groups.
        names: what trains.
        batches: how many have gone by.
        severity: of the findings; an accumulation of one's own may be meant.
    """
    return [
        Seen(
            "not-updated",
            members,
            f"`{group}` trains, but no optimizer has stepped in {batches} batches",
            "`optimizer.step` isn't called: an `optimizer_step` or `training_step` of the module "
            "leaves it out.",
            "Call `optimizer.step(closure)` in an override of `optimizer_step`; raise `dead_after` "
            "if it accumulates gradients over more batches.",
            severity=severity,
        )
        for group, members in by_group(groups, names).items()
    ]


_ZERO: Why = (
    "Its gradient is zero in every element.",
    "Look for code that zeroes its gradients (a hook, a mask, a factor of 0 in the loss).",
)
_ROUNDED: Why = (
    "Its updates are too small for its precision: they are rounded away.",
    "Raise its learning rate, or train it in float32.",
)
_KEPT: Why = (
    "Its gradient and learning rate would move it: some code writes it back, or keeps the "
    "optimizer from stepping it.",
    "Look for code that restores it, or that skips `optimizer.step`.",
)


def _why_unmoved(parameter: Tensor, optimizer: Optimizer, lr: float) -> Why | None:
    """What its gradient says; None where it has none at present."""
    gradient = parameter.grad
    if gradient is None:
        return None
    if all_zero(gradient):
        return _ZERO
    gradient, value = local(gradient), local(parameter)
    size = _step_size(gradient, optimizer.state.get(parameter, {}), lr)
    room = value.abs() * (torch.finfo(value.dtype).eps / 2)
    return _KEPT if bool((size > 2 * room).any()) else _ROUNDED


def _step_size(gradient: Tensor, state: Mapping[str, Any], lr: float) -> Tensor:
    """About how far one step moves each element."""
    first, second = state.get("exp_avg"), state.get("exp_avg_sq")
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return lr * local(first).abs() / (local(second).sqrt() + 1e-8)
    return lr * gradient.abs()


def left_out(
    index: ModelIndex,
    groups: Sequence[LayerGroup],
    held: Collection[int],
    *,
    managed: bool,
) -> frozenset[str]:
    """What a user left out of the optimizers on purpose: frozen by omission.

    Vectors (biases, norms) of a layer group of which something is held; and, where no callback
    unfreezes, whole layer groups below the head, or anything if there is no telling the head.

    Args:
        index: the model.
        groups: its layer groups.
        held: ids of what the optimizers hold, frozen or not.
        managed: whether callbacks of ours freeze and unfreeze.
    """
    out = {
        name
        for name, parameter in index.parameters.items()
        if (parameter.requires_grad or managed) and id(parameter) not in held
    }
    if not any(p.requires_grad and id(p) in held for p in index.parameters.values()):
        return frozenset()  # nothing would train at all: nobody means that
    meant: set[str] = set()
    for group in groups:
        if not out.issuperset(group.parameters):
            vectors = (n for n in group.parameters if len(shape_of(index.parameters[n])) < 2)
            meant.update(out.intersection(vectors))
    if managed:
        return frozenset(meant)
    try:
        head = set(discover(index).head)
    except DiscoveryError:
        return frozenset(out)
    for group in groups:
        if out.issuperset(group.parameters):
            meant.update(name for name in group.parameters if name not in head)
    return frozenset(meant)
