"""The unfrozen side: does what is to train have an optimizer, gradients, and does it move?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_freeze.audit.baseline import Baseline, Moment
from lightning_freeze.audit.findings import Seen
from lightning_freeze.audit.gradients import Why
from lightning_freeze.errors import DiscoveryError
from lightning_freeze.layers import LayerGroup, discover
from lightning_freeze.names import ModelIndex
from lightning_freeze.optimizers import whole_groups


def by_group(groups: Iterable[LayerGroup], names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Layer group -> those of `names` that are in it; groups with none are left out."""
    chosen = set(names)
    found = {g.name: tuple(n for n in g.parameters if n in chosen) for g in groups}
    return {group: members for group, members in found.items() if members}


def without_gradient(
    groups: Iterable[LayerGroup], names: Iterable[str], steps: int, why: Callable[[str], Why]
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
        )
        for (group, reason), members in found.items()
    ]


class Movement:
    """Which parameters that train have moved since they began to.

    It holds no copies, and reads nothing any more once each has moved.
    """

    def __init__(self) -> None:
        self._began = Baseline()
        self._moved: frozenset[str] = frozenset()

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

    def unmoved(self) -> dict[str, int]:
        """Name -> optimizer step since which it hasn't moved; forgets what has."""
        moved = set(self._began.changed())
        self._moved = self._moved.union(self._began.names[position] for position in moved)
        left = [p for p in range(len(self._began)) if p not in moved]
        kept = [(self._began.names[p], self._began.tensor(p)) for p in left]
        places: Any = [(name, tensor) for name, tensor in kept if tensor is not None]
        self._began = Baseline.of(places, (0, 0), self._began)
        return {name: step for name, (_, step) in zip(self._began.names, self._began.since)}


def not_moved(
    groups: Iterable[LayerGroup],
    parameters: Mapping[str, nn.Parameter],
    unmoved: Mapping[str, int],
    optimizers: Sequence[Optimizer],
    step: int,
    least: int,
) -> list[Seen]:
    """Parameters that have gradients and yet don't move: one finding a layer group and cause.

    An update that is lost in rounding is told of only if it happens to a whole layer group: that
    is a learning rate too small for a precision. A single tensor may have a gradient near zero by
    nature, such as the bias of attention's keys.

    Args:
        groups: the layer groups.
        parameters: name -> parameter.
        unmoved: name -> optimizer step since which it hasn't moved, of those that have had a
            gradient.
        optimizers: their learning rates; at zero nothing is expected to move.
        step: optimizer steps so far.
        least: steps after which a parameter should have moved.
    """
    held = {
        id(parameter): (optimizer, group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    seen = []
    for group in groups:
        trained = [n for n in group.parameters if id(parameters[n]) in held]
        stuck: dict[Why, list[str]] = {}
        for name in trained:
            optimizer, options = held[id(parameters[name])]
            if step - unmoved.get(name, step) < least or not options.get("lr"):
                continue
            why = _why_unmoved(parameters[name], optimizer, options)
            if why is not None:
                stuck.setdefault(why, []).append(name)
        for why, names in stuck.items():
            if why is _ROUNDED and len(names) < len(trained):
                continue
            whole = len(names) == len(trained)
            what = (
                f"`{group.name}` has gradients, but none of its {len(names)} tensors has moved"
                if whole
                else f"{', '.join(names)} of `{group.name}` has gradients, but hasn't moved"
            )
            seen.append(Seen("not-updated", tuple(names), what, *why))
    return seen


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


def _why_unmoved(
    parameter: nn.Parameter, optimizer: Optimizer, options: Mapping[str, Any]
) -> Why | None:
    """What its gradient says; None where it has none at present."""
    gradient = parameter.grad
    if gradient is None:
        return None
    gradient = local(gradient)
    if not bool(gradient.any()):
        return _ZERO
    value = local(parameter)
    size = _step_size(gradient, optimizer.state.get(parameter, {}), options)
    room = value.abs() * (torch.finfo(value.dtype).eps / 2)
    return _KEPT if bool((size > 2 * room).any()) else _ROUNDED


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    part = getattr(tensor, "to_local", None)
    return (part() if callable(part) else tensor).detach()


def _step_size(gradient: Tensor, state: Mapping[str, Any], options: Mapping[str, Any]) -> Tensor:
    """About how far one step moves each element."""
    lr = float(options["lr"])
    first, second = state.get("exp_avg"), state.get("exp_avg_sq")
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return lr * local(first).abs() / (local(second).sqrt() + 1e-8)
    return lr * gradient.abs()


def left_out(
    index: ModelIndex,
    groups: Sequence[LayerGroup],
    optimizers: Iterable[Optimizer],
    *,
    managed: bool,
) -> frozenset[str]:
    """What a user left out of the optimizers on purpose: frozen by omission.

    Vectors (biases, norms) of a layer group of which something is held; and, where no callback
    unfreezes, whole layer groups below the head, or anything if there is no telling the head.
    """
    held = {id(p) for o in optimizers for params in whole_groups(o) for p in params}
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
            vectors = (n for n in group.parameters if index.parameters[n].ndim < 2)
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
