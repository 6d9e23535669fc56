"""Any module -> where its repeated layers (blocks) are, from its structure alone.

Each block is a tuple of module paths: a convolution and the normalisation behind it are one block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import nn

from lightning_freeze.model.index import ModelIndex, class_names, size_of

Blocks = list[tuple[str, ...]]

_ATTENTION = re.compile(r"att")
_FEED_FORWARD = re.compile(r"ffn|mlp|feed|^ff")


def class_name(module: nn.Module) -> str:
    """The class a module was written as, before FSDP2 or a parametrization made it another."""
    for kind in type(module).__mro__:
        made = "FSDPModule" in {kind.__name__, *(base.__name__ for base in kind.__bases__)}
        if not made and not kind.__name__.startswith("Parametrized"):
            return class_names(module)[0] if kind is type(module) else kind.__name__
    return type(module).__name__


def is_a(module: nn.Module, name: str) -> bool:
    """Whether a class of this name is among a module's bases."""
    return name in class_names(module)


def is_list(module: object) -> bool:
    """Whether it is a ModuleList or a Sequential."""
    return isinstance(module, nn.Module) and (
        is_a(module, "ModuleList") or is_a(module, "Sequential")
    )


def _is_leaf(index: ModelIndex, path: str) -> bool:
    """True for a module without parts that hold parameters; a parametrization is no part."""
    return all(child.endswith(".parametrizations") for child, _ in index.children(path))


def sequential(index: ModelIndex, path: str) -> Blocks:
    """The children of a container as blocks; a normalisation goes with the layer before it."""
    while len(index.children(path)) == 1 and not _is_leaf(index, index.children(path)[0][0]):
        path = index.children(path)[0][0]
    blocks: Blocks = []
    for child, module in index.children(path):
        if blocks and "Norm" in class_name(module):
            blocks[-1] += (child,)
        else:
            blocks.append((child,))
    return blocks


def homogeneous(index: ModelIndex, module: nn.Module) -> bool:
    """Whether it is a list of two or more modules of one class, all with parameters."""
    members = [m for m in module._modules.values() if m is not None] if is_list(module) else []
    if len(members) < 2 or not all(map(index.holds, members)):
        return False
    return len(set(map(class_name, members))) == 1


def homogeneous_lists(index: ModelIndex, path: str) -> list[str]:
    """Outermost ModuleLists and Sequentials under `path` whose members are all of one class."""
    found = outermost(index, path, lambda module: homogeneous(index, module))
    return [path, *found] if homogeneous(index, index.modules[path]) else found


def outermost(index: ModelIndex, path: str, wanted: Callable[[nn.Module], bool]) -> list[str]:
    """Paths under `path` of the outermost modules that `wanted` accepts, shared ones once."""
    found: list[str] = []
    seen: set[int] = set()
    prefix = path + "." if path else ""
    for name, module in index.modules.items():
        if not name.startswith(prefix) or name == path:
            continue
        if any(name.startswith(outer + ".") for outer in found[-1:]):
            continue
        if wanted(module) and index.holds(module) and id(module) not in seen:
            seen.add(id(module))
            found.append(name)
    return found


def longest_list(index: ModelIndex, path: str) -> Blocks:
    """The members of the longest list of like modules as blocks."""
    lists = homogeneous_lists(index, path)
    if not lists:
        return []

    def rank(name: str) -> tuple[int, bool, int]:
        members = index.children(name)
        norms = all("Norm" in class_name(module) for _, module in members)
        return len(members), not norms, len(index.within(index.modules[name]))

    return with_siblings(index, max(lists, key=rank))


def with_siblings(index: ModelIndex, path: str) -> Blocks:
    """The members of a list as blocks, each with its fellow in the lists that belong to it.

    Many models keep the parts of a layer in lists side by side: `convs` and `norms`, or the
    `attentions`, `layer_norm1`, `ffns` and `layer_norm2` of XLM.
    """
    members = [child for child, _ in index.children(path)]
    joined = [members]
    owner, _, name = path.rpartition(".")
    for other, module in index.children(owner) if path else ():
        if other == path or not is_list(module):
            continue
        listed = [child for child, _ in index.children(other)]
        beside = other.rpartition(".")[2]
        if len(listed) == len(members) and _goes_with(index, name, beside, listed):
            joined.append(listed)
    return list(zip(*joined))


def _goes_with(index: ModelIndex, name: str, other: str, members: Iterable[str]) -> bool:
    if all("Norm" in class_name(index.modules[child]) for child in members):
        return True
    pairs = ((_ATTENTION, _FEED_FORWARD), (_FEED_FORWARD, _ATTENTION))
    return any(one.search(name) and two.search(other) for one, two in pairs)


def elements(index: ModelIndex, module: nn.Module) -> int:
    """Number of elements of a module's parameters."""
    return sum(size_of(index.parameters[name]) for name in index.within(module))


def weight(index: ModelIndex, blocks: Blocks) -> int:
    """Number of elements of the parameters in some blocks."""
    paths = [path for paths in blocks for path in paths]
    names = {name for path in paths for name in index.within(index.modules[path])}
    return sum(size_of(index.parameters[name]) for name in names)


def children(index: ModelIndex, path: str, outside: Iterable[str] = ()) -> Blocks:
    """The children of a module but some, or those of the one container with most of the weights.

    A normalisation goes with the layer before it.
    """
    left_out = frozenset(outside)
    inside = [item for item in index.children(path) if item[0].rpartition(".")[2] not in left_out]
    size = {child: elements(index, module) for child, module in inside}
    blocks: Blocks = []
    for child, module in inside:
        container = is_list(module)
        if container and 2 * size[child] > sum(size.values()):
            return sequential(index, child)
        if blocks and "Norm" in class_name(module):
            blocks[-1] += (child,)
        else:
            blocks.append((child,))
    return blocks


def numbered(index: ModelIndex, path: str) -> Blocks:
    """Children named by number, such as `layer1` to `layer4`, or `stage1` to `stage3`."""
    found: dict[str, Blocks] = {}
    for child, _ in index.children(path):
        match = re.fullmatch(r"(.*?[a-zA-Z])_?\d+", child.rpartition(".")[2])
        if match:
            found.setdefault(match.group(1), []).append((child,))
    groups = [blocks for blocks in found.values() if len(blocks) > 1]
    return max(groups, key=lambda blocks: weight(index, blocks), default=[])


def _stages(index: ModelIndex, path: str, blocks: Blocks) -> Blocks:
    """Blocks, or the stages around them where their list is one of several in a list (VOLO)."""
    around = index.owner(index.owner(blocks[0][0]))
    prefix = path + "." if path else ""
    if around.startswith(prefix) and around != path:
        container = index.modules[around]
        if is_list(container) and len(container._modules) > 1:
            return sequential(index, around)
    return blocks


def repeated(index: ModelIndex, path: str, outside: Iterable[str] = ()) -> Blocks:
    """The repeated layers of a module of any kind.

    The first of these that holds at least half of its weights: children named by number, the
    longest list of like modules, the members of the only container; else all of its children.

    Args:
        index: of the model.
        path: of the module.
        outside: names of children that are no part of it, such as its head.
    """
    left_out = frozenset(outside)
    inside = [item for item in index.children(path) if item[0].rpartition(".")[2] not in left_out]
    if len(inside) == 1 and not _is_leaf(index, inside[0][0]):
        return repeated(index, inside[0][0])
    module = index.modules[path]
    half = sum(elements(index, child) for _, child in inside) / 2
    features = [child for child, _ in inside if child.rpartition(".")[2] == "features"]
    if features:
        return sequential(index, features[0])
    listed = longest_list(index, path)
    listed = [b for b in listed if not left_out.intersection(b[0].split("."))]
    by_number = [b for b in numbered(index, path) if b[0].rpartition(".")[2] not in left_out]
    by_number = by_number if weight(index, by_number) >= half else []
    within = any((b[0] + ".").startswith(stage + ".") for b in listed[:1] for (stage,) in by_number)
    if listed and weight(index, listed) >= half and not within:
        return _stages(index, path, listed)
    if len(by_number) > 1:
        return by_number
    if is_list(module):
        return sequential(index, path)
    largest = max(inside, key=lambda item: elements(index, item[1]), default=None)
    if largest and elements(index, largest[1]) > half and not _is_leaf(index, largest[0]):
        return repeated(index, largest[0])
    if len(inside) > 1:
        return children(index, path, left_out)
    return listed or sequential(index, path)
