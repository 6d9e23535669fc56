"""A model from a library, or any module -> where its repeated layers (blocks) are.

Each block is a tuple of module paths: a convolution and the normalisation behind it are one block.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from lightning_freeze.names import ModelIndex

HEADS = ("classifier", "fc", "heads", "head")
# classifiers in the middle of a torchvision model, for the loss alone
AUXILIARY = ("aux1", "aux2", "AuxLogits", "aux_classifier")


def kind_of(module: nn.Module) -> str | None:
    """Which library a model is from, or is built like: timm, transformers, torchvision."""
    if callable(getattr(module, "group_matcher", None)) and callable(
        getattr(module, "get_classifier", None)
    ):
        return "timm"
    if hasattr(type(module), "base_model_prefix") and hasattr(type(module), "base_model"):
        return "transformers"
    children = dict(module.named_children())
    if any(name in children for name in HEADS):
        layered = {"layer1", "layer2"} <= children.keys()
        layered = layered or hasattr(children.get("encoder"), "layers")
        if "features" in children or layered or _from_torchvision(module):
            return "torchvision"
    return None


def _from_torchvision(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torchvision.models")


def blocks_of(index: ModelIndex, path: str, kind: str) -> list[tuple[str, ...]]:
    """The repeated layers of a model from a library, each as a tuple of module paths."""
    module: Any = index.modules[path]
    if kind == "timm":
        for name in ("blocks", "layers", "stages"):
            if isinstance(getattr(module, name, None), (nn.Sequential, nn.ModuleList)):
                return sequential(index, f"{path}.{name}" if path else name)
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
            return sequential(index, prefix + "features")
        if prefix + "encoder.layers" in index.modules:
            return sequential(index, prefix + "encoder.layers")
        stages = [p for p, _ in index.children(path) if re.search(r"(^|\.)layer\d+$", p)]
        if stages:
            return [(stage,) for stage in stages]
    if kind == "torchvision":
        return _children(index, path)
    return longest_list(index, path)


def _children(index: ModelIndex, path: str) -> list[tuple[str, ...]]:
    """The children of a model beside its head; the one with most of the weights as its own."""
    outside = (*HEADS, *AUXILIARY)
    inside = [item for item in index.children(path) if item[0].rpartition(".")[2] not in outside]
    size = {child: _elements(index, module) for child, module in inside}
    blocks: list[tuple[str, ...]] = []
    for child, module in inside:
        container = isinstance(module, (nn.Sequential, nn.ModuleList))
        if container and 2 * size[child] > sum(size.values()):
            blocks += sequential(index, child)
        else:
            blocks.append((child,))
    return blocks


def _elements(index: ModelIndex, module: nn.Module) -> int:
    return sum(index.parameters[name].numel() for name in index.within(module))


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


def sequential(index: ModelIndex, path: str) -> list[tuple[str, ...]]:
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


def longest_list(index: ModelIndex, path: str) -> list[tuple[str, ...]]:
    """The members of the longest list of like modules as blocks."""
    lists = homogeneous_lists(index, path)
    if not lists:
        return []
    best = max(
        lists,
        key=lambda name: (len(index.children(name)), len(index.within(index.modules[name]))),
    )
    return [(child,) for child, _ in index.children(best)]


def homogeneous_lists(index: ModelIndex, path: str) -> list[str]:
    """Outermost ModuleLists and Sequentials under `path` whose members are all of one class."""

    def homogeneous(module: nn.Module) -> bool:
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            return False
        kinds = {type(child) for child in module}
        return len(module) > 1 and len(kinds) == 1 and all(index.within(m) for m in module)

    found = _outermost(index, path, homogeneous)
    here = index.modules[path]
    return [path, *found] if homogeneous(here) else found
