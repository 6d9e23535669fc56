"""The unfrozen side: does what is to train have an optimizer, gradients, and does it move?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from lightning_freeze.audit.findings import Seen
from lightning_freeze.errors import DiscoveryError
from lightning_freeze.fingerprint import fingerprint
from lightning_freeze.layers import LayerGroup, discover
from lightning_freeze.names import ModelIndex
from lightning_freeze.optimizers import whole_groups


def by_group(groups: Iterable[LayerGroup], names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Layer group -> those of `names` that are in it; groups with none are left out."""
    chosen = set(names)
    found = {g.name: tuple(n for n in g.parameters if n in chosen) for g in groups}
    return {group: members for group, members in found.items() if members}


def without_gradient(groups: Iterable[LayerGroup], names: Iterable[str], steps: int) -> list[Seen]:
    """One finding per layer group for parameters that waited `steps` steps for a gradient."""
    return [
        Seen(
            "no-gradient",
            members,
            f"{members[0] if len(members) == 1 else f'{len(members)} tensors of `{group}`'} had "
            f"no gradient for {steps} optimizer steps although trainable",
            "The loss doesn't depend on it, or its forward runs under `no_grad`.",
            "Use its output in the loss, or freeze it; raise `dead_after` if it is used rarely.",
        )
        for group, members in by_group(groups, names).items()
    ]


def not_moved(
    groups: Iterable[LayerGroup],
    parameters: Mapping[str, nn.Parameter],
    began: Mapping[str, tuple[str, int]],
    lrs: Mapping[str, float],
    step: int,
    least: int,
) -> list[Seen]:
    """Layer groups of which nothing has moved although everything had gradients.

    Args:
        groups: the layer groups.
        parameters: name -> parameter.
        began: name -> fingerprint and optimizer step when it began to train, for those that have
            had a gradient.
        lrs: name -> learning rate now; at zero nothing is expected to move.
        step: optimizer steps so far.
        least: steps after which a group should have moved.
    """
    seen = []
    for group, names in by_group(groups, began).items():
        early = any(step - began[name][1] < least or not lrs.get(name) for name in names)
        if early or any(fingerprint(parameters[name]) != began[name][0] for name in names):
            continue
        seen.append(
            Seen(
                "not-updated",
                names,
                f"`{group}` has gradients, but none of its {len(names)} tensors has moved",
                "Its updates are zero or too small for its precision.",
                "Raise its learning rate, or look for code that zeroes its gradients.",
            )
        )
    return seen


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
