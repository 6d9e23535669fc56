"""Model -> ordered layer groups: those that discovery finds, or a user's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from lightning_freeze.errors import ArgumentError, SelectorError
from lightning_freeze.model.discovery.anatomy import Anatomy, LayerGroup, Stack
from lightning_freeze.model.discovery.rules import backbone_at, discover
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.model.selectors import Selector, Selectors, label_of, select

__all__ = [
    "Anatomy",
    "LayerGroup",
    "Stack",
    "anatomy",
    "backbone_at",
    "discover",
    "groups_of",
    "layer_groups",
    "select_or_group",
]


def anatomy(model: nn.Module) -> Anatomy:
    """What discovery finds in a model, and by which rule: stem, stacks of blocks, head.

    Args:
        model: any module; a LightningModule is searched for the model it wraps.

    Returns:
        An `Anatomy`. It prints as a short text; `.stacks` are the towers that can be named, as in
        `FreezeBackbone("model.vision_tower", trainable_layers=2)`.

    Raises:
        DiscoveryError: no rule applies; the message lists the candidates.

    Example:
        >>> features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
        >>> print(anatomy(nn.ModuleDict({"features": features, "classifier": nn.Linear(4, 2)})))
        found by torchvision's `classifier` on `ModuleDict`
        blocks  features.0 ... features.1 (2 blocks)
        head    classifier
    """
    return discover(ModelIndex.of(model))


def layer_groups(model: nn.Module, patterns: Sequence[Selectors] | None = None) -> list[LayerGroup]:
    """Split a model into layer groups, bottom (input) to top (output).

    The groups are disjoint and cover every parameter. For BERT: embeddings, layer 0 to n-1, and
    `head`, which the pooler goes with. A tied tensor is in the group of its first name.

    Args:
        model: any module; a LightningModule is searched for the model it wraps.
        patterns: your own groups instead, bottom to top, each a selector or a list of selectors.
            What they leave out joins in model order: before the first group as `bottom`, after
            the last as `head`, and otherwise the group that stands before it.

    Returns:
        One `LayerGroup` per group.

    Raises:
        DiscoveryError: no rule finds blocks; the message lists the candidates.
        SelectorError: a pattern matches nothing.
        ArgumentError: two patterns claim one parameter.

    Example:
        >>> features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
        >>> model = nn.ModuleDict({"features": features, "classifier": nn.Linear(4, 2)})
        >>> [group.name for group in layer_groups(model)]
        ['features.0', 'features.1', 'head']
    """
    index = ModelIndex.of(model)
    return list(groups_of(index, patterns))


def groups_of(
    index: ModelIndex, patterns: Sequence[Selectors] | None = None
) -> tuple[LayerGroup, ...]:
    """`layer_groups` of a model that is already indexed."""
    if patterns is None:
        return discover(index).groups
    return _by_patterns(index, patterns)


def select_or_group(
    index: ModelIndex, groups: Sequence[LayerGroup], selector: Selector
) -> tuple[str, ...]:
    """Names that a selector means; the name of a layer group will do."""
    try:
        return select(index, selector)
    except SelectorError:
        for group in groups:
            if group.name == selector:
                return group.parameters
        raise


def _by_patterns(index: ModelIndex, patterns: Sequence[Selectors]) -> tuple[LayerGroup, ...]:
    if isinstance(patterns, str) or not list(patterns):
        raise ArgumentError(
            f"`groups` is {patterns!r}. Write a list, bottom to top, such as "
            '`["embeddings", ["encoder.layer.0", "encoder.layer.1"], "classifier"]`.'
        )
    owner: dict[str, int] = {}
    names: list[str] = []
    for position, pattern in enumerate(patterns):
        chosen = select(index, pattern)
        taken = [name for name in chosen if name in owner]
        if taken:
            raise ArgumentError(
                f"`{taken[0]}` is in two layer groups: {names[owner[taken[0]]]} and "
                f"{label_of(pattern)}. Layer groups must be disjoint."
            )
        owner.update(dict.fromkeys(chosen, position))
        names.append(label_of(pattern))
    members: dict[int, list[str]] = {i: [] for i in range(-1, len(names) + 1)}
    remaining = sum(1 for name in index.parameters if name in owner)
    current = -1
    for name in index.parameters:
        if name in owner:
            current = owner[name]
            remaining -= 1
        elif not remaining:
            current = len(names)
        members[current].append(name)
    labelled = zip(_unique(("bottom", *names, "head")), members.values())
    return tuple(LayerGroup(label, tuple(found)) for label, found in labelled if found)


def _unique(labels: Iterable[str]) -> list[str]:
    """Number the repeated ones: two lambdas, or a user's `head` below what is left over."""
    seen: dict[str, int] = {}
    found = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        found.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return found
