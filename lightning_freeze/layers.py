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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_freeze.errors import ArgumentError, DiscoveryError
from lightning_freeze.names import ModelIndex
from lightning_freeze.selectors import Selectors, as_selectors, select

_HEADS = ("classifier", "fc", "heads", "head")
# parts that stand above the blocks although some models register them first
_ABOVE = re.compile(r"^(?!.*emb).*(pooler|(^|\.)(final|last|post|top)_|(^|\.)(ln_f|norm)(\.|$))")
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
    labelled = zip(("bottom", *names, "head"), members.values())
    return tuple(LayerGroup(label, tuple(found)) for label, found in labelled if found)


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
    for name in backbone:
        if name in seen:
            continue
        below = [i for i, start in enumerate(starts) if start < order[name]]
        inner = name.removeprefix(base + ".")
        if not below:
            (above if _ABOVE.search(inner) else stem).append(name)
        elif order[name] > max(ends):
            (stem if _BELOW.search(inner) else above).append(name)
        else:
            extra.setdefault(max(below), []).append(name)
    final = tuple(
        LayerGroup(block.name, block.parameters + tuple(extra.get(i, ())))
        for i, block in enumerate(kept)
    )
    bottom = LayerGroup(_stem_name(index, stem), tuple(stem)) if stem else None
    return Anatomy(rule, bottom, final, tuple(above), head)


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
    parts = dict.fromkeys(name.removeprefix(prefix).split(".")[0] for name in names)
    return prefix + "+".join(parts)


def _by_attribute(index: ModelIndex, root: str, names: tuple[str, ...]) -> Anatomy | None:
    for attribute in names:
        path = f"{root}.{attribute}" if root else attribute
        module = index.modules.get(path)
        if module is None:
            continue
        core = index.within(module)
        around = index.within(index.modules[root])
        if core and len(core) < len(around):
            rule = f"the attribute `{path}`"
            inner = [(p, k) for p, k in _zoo_models(index) if p == path or p.startswith(path + ".")]
            blocks = _blocks(index, inner[0][0], inner[0][1]) if len(inner) == 1 else []
            blocks = blocks or _longest_list(index, path) or _sequential(index, path)
            return _anatomy(index, rule, core, _as_groups(index, blocks))
    return None


def _zoo_models(index: ModelIndex) -> list[tuple[str, str]]:
    """Outermost models that a model library made, as (path, which library)."""
    found: list[tuple[str, str]] = []
    for path, module in sorted(index.modules.items(), key=lambda item: item[0].count(".")):
        if any(path == p or p == "" or path.startswith(p + ".") for p, _ in found):
            continue
        kind = _kind(module)
        if kind and index.within(module):
            found.append((path, kind))
    return found


def _kind(module: nn.Module) -> str | None:
    if callable(getattr(module, "group_matcher", None)) and callable(
        getattr(module, "get_classifier", None)
    ):
        return "timm"
    if hasattr(type(module), "base_model_prefix") and hasattr(type(module), "base_model"):
        return "transformers"
    children = dict(module.named_children())
    if any(name in children for name in _HEADS):
        layered = {"layer1", "layer2"} <= children.keys()
        layered = layered or hasattr(children.get("encoder"), "layers")
        if "features" in children or layered or _from_torchvision(module):
            return "torchvision"
    return None


def _from_torchvision(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torchvision.models")


def _in_zoo_model(index: ModelIndex, path: str, kind: str) -> Anatomy:
    module: Any = index.modules[path]
    everything = index.within(module)
    if kind == "transformers":
        base = module.base_model
        core = index.within(base) if id(base) in index._paths else everything
        rule = f"transformers' `base_model` (`{index.path(base)}`)"
        blocks = _blocks(index, index.path(base), kind)
        return _anatomy(index, rule, core, _as_groups(index, blocks))
    if kind == "timm":
        heads = module.get_classifier()
        parts = heads if isinstance(heads, (tuple, list)) else [heads]
        head = {name for part in parts for name in index.within(part)}
        rule = f"timm's `get_classifier()` on `{path or type(module).__name__}`"
    else:
        attribute = next(a for a in _HEADS if a in dict(module.named_children()))
        head = set(index.within(getattr(module, attribute)))
        rule = f"torchvision's `{attribute}` on `{path or type(module).__name__}`"
    core = tuple(name for name in everything if name not in head)
    return _anatomy(index, rule, core, _as_groups(index, _blocks(index, path, kind)))


def _blocks(index: ModelIndex, path: str, kind: str) -> list[tuple[str, ...]]:
    """The repeated layers of a model from a library, each as a tuple of module paths."""
    module: Any = index.modules[path]
    if kind == "timm":
        for name in ("blocks", "layers", "stages"):
            if isinstance(getattr(module, name, None), (nn.Sequential, nn.ModuleList)):
                return _sequential(index, f"{path}.{name}" if path else name)
    if kind == "transformers":
        found = _outermost(index, path, lambda m: _is_a(m, "GradientCheckpointingLayer"))
        recorded = getattr(module, "_can_record_outputs", None) or {}
        layer = recorded.get("hidden_states") if isinstance(recorded, dict) else None
        if not found and isinstance(layer, type):
            found = _outermost(index, path, lambda m: isinstance(m, layer))
        if found:
            return [(name,) for name in found]
    prefix = path + "." if path else ""
    if kind in ("torchvision", "timm"):
        if prefix + "features" in index.modules:
            return _sequential(index, prefix + "features")
        if prefix + "encoder.layers" in index.modules:
            return _sequential(index, prefix + "encoder.layers")
        stages = [p for p, _ in index.children(path) if re.search(r"(^|\.)layer\d+$", p)]
        if stages:
            return [(stage,) for stage in stages]
    return _longest_list(index, path)


def _is_a(module: nn.Module, name: str) -> bool:
    return any(base.__name__ == name for base in type(module).__mro__)


def _outermost(index: ModelIndex, path: str, wanted: Any) -> list[str]:
    """Paths under `path` of the outermost modules that `wanted` accepts, shared ones once."""
    found: list[str] = []
    seen: set[int] = set()
    prefix = path + "." if path else ""
    for name, module in index.modules.items():
        if not name.startswith(prefix) or name == path or not index.within(module):
            continue
        if any(name.startswith(outer + ".") for outer in found[-1:]):
            continue
        if wanted(module) and id(module) not in seen:
            seen.add(id(module))
            found.append(name)
    return found


def _sequential(index: ModelIndex, path: str) -> list[tuple[str, ...]]:
    """The children of a container as blocks; a normalisation goes with the layer before it."""
    while len(index.children(path)) == 1 and not _is_leaf(index, index.children(path)[0][0]):
        path = index.children(path)[0][0]
    blocks: list[tuple[str, ...]] = []
    for child, module in index.children(path):
        if blocks and "Norm" in type(module).__name__:
            blocks[-1] += (child,)
        else:
            blocks.append((child,))
    return blocks


def _is_leaf(index: ModelIndex, path: str) -> bool:
    return not index.children(path)


def _longest_list(index: ModelIndex, path: str) -> list[tuple[str, ...]]:
    lists = _homogeneous_lists(index, path)
    if not lists:
        return []
    best = max(
        lists,
        key=lambda name: (len(index.children(name)), len(index.within(index.modules[name]))),
    )
    return [(child,) for child, _ in index.children(best)]


def _homogeneous_lists(index: ModelIndex, path: str) -> list[str]:
    """Outermost ModuleLists and Sequentials under `path` whose members are all of one class."""

    def homogeneous(module: nn.Module) -> bool:
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            return False
        kinds = {type(child) for child in module}
        return len(module) > 1 and len(kinds) == 1 and all(index.within(m) for m in module)

    found = _outermost(index, path, homogeneous)
    here = index.modules[path]
    return [path, *found] if homogeneous(here) else found


def _by_list(index: ModelIndex, root: str) -> Anatomy | None:
    module = index.modules[root]
    if isinstance(module, nn.Sequential) and len(index.children(root)) > 1:
        blocks = _sequential(index, root)
        core = [n for paths in blocks[:-1] for p in paths for n in index.within(index.modules[p])]
        if blocks[:-1]:
            rule = f"the layers of the Sequential `{root}`"
            return _anatomy(index, rule, core, _as_groups(index, blocks[:-1]))
    blocks = _longest_list(index, root)
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
                paths = _longest_list(index, path) or _sequential(index, path)
                found = _as_groups(index, paths)
                break
    return _anatomy(index, rule, core, found)


def _not_found(index: ModelIndex) -> DiscoveryError:
    children = [f"`{name}` ({type(m).__name__})" for name, m in index.children("")]
    lists = [f"`{name}`" for name in _homogeneous_lists(index, "")]
    names = [name for name, _ in index.children("")] or ["encoder"]
    listed = f"Lists of like modules: {', '.join(lists)}. " if lists else ""
    return DiscoveryError(
        "No backbone was found: there is no timm, transformers or torchvision model, no "
        "attribute `backbone`, `feature_extractor` or `encoder` with a head beside it, and no "
        f"list of like layers below a head. The model has: {', '.join(children) or 'no parameters'}"
        f'. {listed}Say it yourself: `FreezeBackbone(backbone="{names[0]}")`, or '
        f"`GradualUnfreeze(groups={names})`, bottom to top."
    )
