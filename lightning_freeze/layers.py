"""Model -> ordered layer groups: where the backbone, its blocks and the head are.

The rules, in this order; the first that finds something wins and is named in the result:

1. a `backbone` or `feature_extractor` attribute with parameters beside it: the author said so;
2. timm (`group_matcher`, `get_classifier`), 3. transformers (`base_model`), 4. torchvision
   (`features` or `layer1..4` or `encoder.layers` under a `classifier`, `fc`, `heads` or `head`);
5. an `encoder` attribute with parameters beside it;
6. the longest list of modules of one class; 7. a model that is a plain `nn.Sequential`.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import nn

from lightning_freeze.blocks import (
    AUXILIARY,
    HEADS,
    blocks_of,
    homogeneous_lists,
    kind_of,
    longest_list,
    sequential,
)
from lightning_freeze.errors import ArgumentError, DiscoveryError, SelectorError
from lightning_freeze.names import ModelIndex
from lightning_freeze.selectors import Selector, Selectors, as_selectors, select

# parts that stand above the blocks although some models register them first
_ABOVE = re.compile(
    r"^(?!.*emb).*(pooler|(^|\.)(final|last|post|top)_|(^|\.)(ln_f|norm|project_out)(\.|$))"
)
# and parts that belong to the input although some models register them last
_BELOW = re.compile(r"emb|relative_attention_bias")


@dataclass(frozen=True)
class LayerGroup:
    """Parameters that freeze and unfreeze as one.

    Attributes:
        name: a module path where there is one, such as `bert.encoder.layer.0`, or `head`.
        parameters: dotted parameter names, in model order.
    """

    name: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Anatomy:
    """What discovery found.

    Attributes:
        rule: which rule found it, in words.
        stem: parameters below the first block (embeddings), or None.
        blocks: the repeated layers, bottom to top.
        above: backbone parameters above the last block (pooler, final norm).
        head: parameters outside the backbone.
    """

    rule: str
    stem: LayerGroup | None
    blocks: tuple[LayerGroup, ...]
    above: tuple[str, ...]
    head: tuple[str, ...]

    @property
    def backbone(self) -> tuple[str, ...]:
        """Parameters of the backbone: stem, blocks and what is above them."""
        groups = ((self.stem,) if self.stem else ()) + self.blocks
        return tuple(name for group in groups for name in group.parameters) + self.above

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """Stem, blocks, and a group `head` that what stands above the blocks goes with."""
        top = self.above + self.head
        return (
            ((self.stem,) if self.stem else ())
            + self.blocks
            + ((LayerGroup("head", top),) if top else ())
        )


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
                f"{_label(pattern)}. Layer groups must be disjoint."
            )
        owner.update(dict.fromkeys(chosen, position))
        names.append(_label(pattern))
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


def _label(pattern: Selectors) -> str:
    parts = [s if isinstance(s, str) else "callable" for s in as_selectors(pattern)]
    return "+".join(parts)


def discover(index: ModelIndex) -> Anatomy:
    """Find backbone, blocks and head; the module docstring lists the rules.

    Raises:
        DiscoveryError: no rule applies, or several models could be the one that is meant.
    """
    for root in index.roots:
        found = _by_attribute(index, root, ("backbone", "feature_extractor"))
        if found:
            return found
    zoo = _zoo_models(index)
    if len(zoo) == 1:
        path, kind = zoo[0]
        return _in_zoo_model(index, path, kind)
    if len(zoo) > 1:
        names = ", ".join(f"`{path}`" for path, _ in zoo)
        raise DiscoveryError(
            f"Several models could hold the backbone: {names}. Name one, as in "
            f'`FreezeBackbone(backbone="{zoo[0][0]}")`, or give `groups`.'
        )
    for root in index.roots:
        found = _by_attribute(index, root, ("encoder",)) or _by_list(index, root)
        if found:
            return found
    raise _not_found(index)


def _anatomy(
    index: ModelIndex, rule: str, core: Iterable[str], blocks: Sequence[LayerGroup]
) -> Anatomy:
    """Sort a backbone's parameters into stem, blocks and what is above them."""
    backbone = list(dict.fromkeys(core))
    members = set(backbone)
    kept: list[LayerGroup] = []
    seen: set[str] = set()
    for block in blocks:
        found = tuple(name for name in block.parameters if name in members and name not in seen)
        if found:
            seen.update(found)
            kept.append(LayerGroup(block.name, found))
    head = tuple(name for name in index.parameters if name not in members)
    if not kept:
        return Anatomy(rule, LayerGroup(_stem_name(index, backbone), tuple(backbone)), (), (), head)
    order = {name: i for i, name in enumerate(index.parameters)}
    stem: list[str] = []
    above: list[str] = []
    extra: dict[int, list[str]] = {}
    starts = [min(order[name] for name in block.parameters) for block in kept]
    ends = [max(order[name] for name in block.parameters) for block in kept]
    base = _common(backbone)

    def blocks_after(name: str) -> list[str]:
        return [block.name for block, start in zip(kept, starts) if start > order[name]]

    in_order = sorted(zip(starts, range(len(starts))))
    firsts = [start for start, _ in in_order]
    # of the blocks that begin before it, the one that is highest in the stack
    highest = list(accumulate((place for _, place in in_order), max))
    last = max(ends)

    for name in backbone:
        if name in seen:
            continue
        below = bisect_left(firsts, order[name])
        inner = name.removeprefix(base + ".")
        if not below:
            (above if _ABOVE.search(inner) else stem).append(name)
        elif order[name] > last:
            (stem if _BELOW.search(inner) else above).append(name)
        elif _BELOW.search(inner) and not _shares_top(inner, blocks_after(name), base):
            stem.append(name)  # an encoder's input, registered after its layers
        else:
            extra.setdefault(highest[below - 1], []).append(name)
    final = tuple(
        LayerGroup(block.name, block.parameters + tuple(extra.get(i, ())))
        for i, block in enumerate(kept)
    )
    bottom = LayerGroup(_stem_name(index, stem), tuple(stem)) if stem else None
    return Anatomy(rule, bottom, final, tuple(above), head)


def _shares_top(inner: str, blocks: Iterable[str], base: str) -> bool:
    """Whether a part and any of some blocks are in the same child of the backbone."""
    top = inner.split(".")[0]
    return any(block.removeprefix(base + ".").split(".")[0] == top for block in blocks)


def _as_groups(index: ModelIndex, blocks: Sequence[tuple[str, ...]]) -> list[LayerGroup]:
    return [
        LayerGroup(paths[0], tuple(n for p in paths for n in index.within(index.modules[p])))
        for paths in blocks
    ]


def _common(names: Sequence[str]) -> str:
    """The deepest module path that all parameter names share."""
    paths = [name.split(".")[:-1] for name in names]
    shared = paths[0]
    for path in paths[1:]:
        keep = 0
        while keep < min(len(shared), len(path)) and shared[keep] == path[keep]:
            keep += 1
        shared = shared[:keep]
    return ".".join(shared)


def _stem_name(index: ModelIndex, names: Sequence[str]) -> str:
    """A module path if the stem is one module, else its parts: `electra.embeddings+project`."""
    base = _common(names)
    if base and set(index.within(index.modules[base])) == set(names):
        return base
    prefix = base + "." if base else ""
    members = set(names)
    parts: dict[str, None] = {}
    for name in names:
        part = ""
        for component in name.removeprefix(prefix).split("."):
            part = f"{part}.{component}" if part else component
            module = index.modules.get(prefix + part)
            if module is not None and members.issuperset(index.within(module)):
                break
        parts[part] = None
    return prefix + "+".join(parts)


def _by_attribute(index: ModelIndex, root: str, names: tuple[str, ...]) -> Anatomy | None:
    for attribute in names:
        path = f"{root}.{attribute}" if root else attribute
        module = index.modules.get(path)
        if module is None:
            continue
        if attribute == "feature_extractor" and kind_of(index.modules[root]):
            continue  # a speech model's own convolutions are no more than its first layers
        core = index.within(module)
        around = index.within(index.modules[root])
        if core and len(core) < len(around):
            rule = f"the attribute `{path}`"
            inner = [(p, k) for p, k in _zoo_models(index) if p == path or p.startswith(path + ".")]
            blocks = blocks_of(index, inner[0][0], inner[0][1]) if len(inner) == 1 else []
            blocks = blocks or longest_list(index, path) or sequential(index, path)
            return _anatomy(index, rule, core, _as_groups(index, blocks))
    return None


def _zoo_models(index: ModelIndex) -> list[tuple[str, str]]:
    """Outermost models that a model library made, as (path, which library)."""
    found: list[tuple[str, str]] = []
    for path, module in sorted(index.modules.items(), key=lambda item: item[0].count(".")):
        if any(path == p or p == "" or path.startswith(p + ".") for p, _ in found):
            continue
        kind = kind_of(module)
        if kind and index.within(module):
            found.append((path, kind))
    return found


def _in_zoo_model(index: ModelIndex, path: str, kind: str) -> Anatomy:
    module: Any = index.modules[path]
    everything = index.within(module)
    if kind == "transformers":
        base = module.base_model
        inside = index.path(base)
        rule = f"transformers' `base_model` (`{inside or type(base).__name__}`)"
        blocks = blocks_of(index, inside, kind)
        layers = getattr(module.config, "num_hidden_layers", None)
        if hasattr(module.config, "num_hidden_groups") and len(blocks) != layers:
            rule += f", whose {layers} layers share the weights of {len(blocks)}"
        return _anatomy(index, rule, index.within(base), _as_groups(index, blocks))
    if kind == "timm":
        found = module.get_classifier()
        parts = found if isinstance(found, (tuple, list)) else [found]
        heads = [part for part in parts if isinstance(part, nn.Module)]
        head = {name for part in heads for name in index.within(part)}
        rule = f"timm's `get_classifier()` on `{path or type(module).__name__}`"
    else:
        children = dict(module.named_children())
        attribute = next(name for name in HEADS if name in children)
        tops = [attribute, *(name for name in AUXILIARY if name in children)]
        head = {name for top in tops for name in index.within(children[top])}
        rule = f"torchvision's `{attribute}` on `{path or type(module).__name__}`"
    core = tuple(name for name in everything if name not in head)
    return _anatomy(index, rule, core, _as_groups(index, blocks_of(index, path, kind)))


def _by_list(index: ModelIndex, root: str) -> Anatomy | None:
    module = index.modules[root]
    if isinstance(module, nn.Sequential) and len(index.children(root)) > 1:
        blocks = sequential(index, root)
        core = [n for paths in blocks[:-1] for p in paths for n in index.within(index.modules[p])]
        if blocks[:-1]:
            rule = f"the order of the Sequential `{root or type(module).__name__}`"
            return _anatomy(index, rule, core, _as_groups(index, blocks[:-1]))
    blocks = longest_list(index, root)
    if not blocks:
        return None
    order = {name: i for i, name in enumerate(index.parameters)}
    last = max(order[n] for (p,) in blocks for n in index.within(index.modules[p]))
    core = [name for name in index.parameters if order[name] <= last]
    if len(core) == len(index.parameters):
        return None
    container = index.owner(blocks[0][0])
    rule = f"the list of like modules `{container}`"
    return _anatomy(index, rule, core, _as_groups(index, blocks))


def backbone_at(index: ModelIndex, selectors: Selectors) -> Anatomy:
    """The backbone that a user names, with its blocks where they can be found.

    Raises:
        SelectorError: a selector matches nothing.
    """
    core = select(index, selectors)
    rule = f"`backbone={_label(selectors)}`"
    try:
        found = [block for block in discover(index).blocks if set(block.parameters) <= set(core)]
    except DiscoveryError:
        found = []
    if not found:
        for path, module in index.modules.items():
            if index.within(module) == core:
                paths = longest_list(index, path) or sequential(index, path)
                found = _as_groups(index, paths)
                break
    return _anatomy(index, rule, core, found)


def _not_found(index: ModelIndex) -> DiscoveryError:
    children = [f"`{name}` ({type(m).__name__})" for name, m in index.children("")]
    lists = [f"`{name}`" for name in homogeneous_lists(index, "")]
    names = [name for name, _ in index.children("")] or ["encoder"]
    listed = f"Lists of like modules: {', '.join(lists)}. " if lists else ""
    return DiscoveryError(
        "No backbone was found: there is no timm, transformers or torchvision model, no "
        "attribute `backbone`, `feature_extractor` or `encoder` with a head beside it, and no "
        f"list of like layers below a head. The model has: {', '.join(children) or 'no parameters'}"
        f'. {listed}Say it yourself: `FreezeBackbone(backbone="{names[0]}")`, or '
        f"`GradualUnfreeze(groups={names})`, bottom to top."
    )
