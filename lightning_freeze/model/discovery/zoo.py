"""A model from timm, transformers or torchvision -> its backbone, blocks and head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from lightning_freeze.model.discovery.adapters import adapter_names
from lightning_freeze.model.discovery.anatomy import Anatomy, LayerGroup
from lightning_freeze.model.discovery.assembly import assemble, is_above, is_below
from lightning_freeze.model.discovery.blocks import (
    Blocks,
    children,
    class_name,
    elements,
    homogeneous,
    homogeneous_lists,
    is_a,
    is_list,
    longest_list,
    outermost,
    repeated,
    sequential,
    weight,
    with_siblings,
)
from lightning_freeze.model.index import ModelIndex, unwrap

HEADS = ("classifier", "fc", "heads", "head")
# classifiers in the middle of a torchvision model, for the loss alone
AUXILIARY = ("aux1", "aux2", "AuxLogits", "aux_classifier")
# a transformers class with a head has one of these in its name
_TASK = re.compile(r"For[A-Z]|Heads?(Model)?$|LMHead|EncoderDecoder|MTModel$|Decoder$")
# the convolutions that a speech model begins with: its input, as an embedding is a text model's
# share of a model's weights that makes a part a tower
_LEAST = 0.04
_NO_TOWER = re.compile(
    r"head|classif|merger|proj|connector|codec|vocoder|wav|neck|feature_e(xtractor|ncoder)|conv$"
    r"|^pos_|embedder|output|resampler|compressor|adapter|net$|fpn|pan_|lateral"
)
_INPUT_LISTS = re.compile(r"(^|\.)(feature_extractor|feature_encoder|prenet)\.|conv_layers\.\d+$")


def kind_of(module: nn.Module) -> str | None:
    """Which library a model is from, or is built like: timm, transformers, torchvision."""
    return _made_by(type(module)) or _built_like(module)


def _made_by(kind: type) -> str | None:
    if callable(getattr(kind, "group_matcher", None)) and callable(
        getattr(kind, "get_classifier", None)
    ):
        return "timm"
    if hasattr(kind, "base_model_prefix") and hasattr(kind, "base_model"):
        return "transformers"
    return None


def _built_like(module: nn.Module) -> str | None:
    if not set(HEADS).isdisjoint(module._modules.keys()):
        inside = dict(module.named_children())
        if not any(name in inside for name in HEADS):
            return None
        layered = {"layer1", "layer2"} <= inside.keys()
        layered = layered or hasattr(inside.get("encoder"), "layers")
        if "features" in inside or layered or _from_torchvision(module):
            return "torchvision"
    return None


def has_task(module: nn.Module) -> bool:
    """Whether a transformers class has a head: by its name, or because a user wrote it."""
    kinds = type(module).__mro__
    if any(_TASK.search(kind.__name__) for kind in kinds[:2]):
        return True
    return not any(kind.__module__.startswith("transformers.models.") for kind in kinds)


def _from_torchvision(module: nn.Module) -> bool:
    return any(base.__module__.startswith("torchvision.models") for base in type(module).__mro__)


def zoo_models(index: ModelIndex, under: str = "") -> list[tuple[str, str]]:
    """Outermost models that a model library made, as (path, which library)."""
    found: list[tuple[str, str]] = []
    prefix = under + "." if under else ""
    made_by = {kind: _made_by(kind) for kind in set(map(type, index.modules.values()))}
    likely = [
        (path, module)
        for path, module in index.modules.items()
        if made_by[type(module)] or not set(HEADS).isdisjoint(module._modules.keys())
    ]
    inside = [item for item in likely if (item[0] + ".").startswith(prefix)]
    for path, module in sorted(inside, key=lambda item: item[0].count(".") + bool(item[0])):
        if any(p in (path, "") or path.startswith(p + ".") for p, _ in found):
            continue
        kind = kind_of(module)
        if kind and index.holds(module):
            found.append((path, kind))
    return found


def as_groups(index: ModelIndex, blocks: Blocks) -> list[LayerGroup]:
    """Blocks as layer groups, each named after its first module."""
    return [
        LayerGroup(paths[0], tuple(n for p in paths for n in index.within(index.modules[p])))
        for paths in blocks
    ]


def in_zoo_model(index: ModelIndex, path: str, kind: str) -> Anatomy:
    """The anatomy of a model from a library; what is around it counts as head."""
    module: Any = index.modules[path]
    if kind == "transformers":
        return _in_transformers(index, path, module)
    everything = index.within(module)
    if kind == "timm":
        found = module.get_classifier()
        parts = found if isinstance(found, (tuple, list)) else [found]
        heads = [part for part in parts if isinstance(part, nn.Module)]
        head = {name for part in heads for name in index.within(part)}
        rule = f"timm's `get_classifier()` on `{path or type(module).__name__}`"
    else:
        inside = dict(module.named_children())
        attribute = next(name for name in HEADS if name in inside)
        tops = [attribute, *(name for name in AUXILIARY if name in inside)]
        head = {name for top in tops for name in index.within(inside[top])}
        rule = f"torchvision's `{attribute}` on `{path or type(module).__name__}`"
    core = tuple(name for name in everything if name not in head)
    blocks = as_groups(index, blocks_of(index, path, kind))
    adapters = adapter_names(index, path)
    return assemble(index, _told(rule, core, adapters), core, blocks, adapters=adapters)


def _told(rule: str, core: Sequence[str], adapters: Sequence[str]) -> str:
    return f"{rule}, with PEFT adapters" if set(adapters) & set(core) else rule


def blocks_of(index: ModelIndex, path: str, kind: str) -> Blocks:
    """The repeated layers of a model from a library, each as a tuple of module paths."""
    if kind == "transformers":
        return _transformers_blocks(index, path)
    module: Any = index.modules[path]
    prefix = path + "." if path else ""
    if kind == "timm":
        for name in ("blocks", "layers", "stages"):
            if is_list(getattr(module, name, None)):
                return sequential(index, prefix + name)
    for name in ("features", "encoder.layers"):
        if prefix + name in index.modules:
            return sequential(index, prefix + name)
    stages = [p for p, _ in index.children(path) if re.search(r"(^|\.)(layer|stage)\d+$", p)]
    if len(stages) > 1:
        return [(stage,) for stage in stages]
    if kind == "torchvision":
        return children(index, path, (*HEADS, *AUXILIARY))
    found = module.get_classifier()
    head = {index.path(part) for part in module.children() if part is found}
    return repeated(index, path, {name.rpartition(".")[2] for name in head})


def _in_transformers(index: ModelIndex, path: str, module: Any) -> Anatomy:
    base, inside = _base_of(index, path, module)
    rule = f"transformers' `base_model` (`{inside or type(base).__name__}`)"
    kind = kind_of(base)
    if kind == "timm":
        return in_zoo_model(index, inside, "timm")
    blocks = _transformers_blocks(index, inside)
    layers = getattr(module.config, "num_hidden_layers", None)
    if hasattr(module.config, "num_hidden_groups") and len(blocks) != layers:
        rule += f", whose {layers} layers share the weights of {len(blocks)}"
    core = index.within(base)
    tied: tuple[str, ...] = ()
    if len(core) == len(index.within(module)):
        head, tied = _head_inside(index, path, base, blocks)
        core = tuple(name for name in core if name not in head)
    adapters = adapter_names(index, inside)
    return assemble(
        index,
        _told(rule, core, adapters),
        core,
        as_groups(index, blocks),
        towers=True,
        parallel=hasattr(type(base), "get_text_features"),
        adapters=adapters,
        tied=tied,
    )


def _base_of(index: ModelIndex, path: str, module: Any) -> tuple[nn.Module, str]:
    """The body of a transformers model, and where it is.

    `base_model` goes by an attribute's name, and in a model without a head (DINOv3) that can be
    its encoder, with the embeddings beside it: such a model is its own body.
    """
    base = unwrap(module.base_model)
    inside = index.path(base)
    if base is module or not index.holds(base):
        return module, path
    if not has_task(module):
        parts = [
            name.rpartition(".")[2] for name, child in index.children(path) if child is not base
        ]
        if all(is_below(part) or is_above(part) or "norm" in part for part in parts):
            return module, path
    return base, inside


def _head_inside(
    index: ModelIndex, path: str, base: nn.Module, blocks: Blocks
) -> tuple[frozenset[str], tuple[str, ...]]:
    """The head of a model whose `base_model` holds all of it, and the names of one that is tied.

    That of a language model inside (BLIP-2, encoder-decoder pairs) and the output embedding where
    it isn't tied to the input's (T5), else what is beside the base (RT-DETR, whose base uses its
    heads, too), else what follows the last block.
    """
    module: Any = index.modules[path]
    if not has_task(module):
        return frozenset(), ()
    inner: frozenset[str] = frozenset()
    for _, child in index.children(path):
        if kind_of(child) == "transformers" and has_task(child):
            body: Any = child.base_model
            inner |= frozenset(index.within(child)).difference(index.within(unwrap(body)))
    out = None
    with suppress(Exception):  # many models have none, and say so in many ways
        out = module.get_output_embeddings()
    if isinstance(out, nn.Module) and id(unwrap(out)) in {id(m) for m in index.modules.values()}:
        place = index.path(out) + "."
        own = [n for n in index.within(out) if n.startswith(place)]
        if is_below(place.split(".")[-2]):
            own = []  # FSMT's decoder embeds with what it predicts with
        head = inner | frozenset(own)
        shared = [
            n for n, first in index.canonical.items() if n.startswith(place) and first not in head
        ]
        return head, tuple(shared)
    beside = [_names(index, child) for child, m in index.children(path) if m is not base]
    if inner or not blocks or (beside and base is not module):
        return inner or frozenset(n for names in beside for n in names if base is not module), ()
    last = max(index.order[n] for paths in blocks for p in paths for n in _names(index, p))
    after = [names for names in beside if min(index.order[n] for n in names) > last]
    return frozenset(n for names in after for n in names), ()


def _names(index: ModelIndex, path: str) -> tuple[str, ...]:
    return index.within(index.modules[path])


def _transformers_blocks(index: ModelIndex, path: str) -> Blocks:
    """The layers of all towers, in order of registration."""
    module: Any = index.modules[path]
    found = outermost(index, path, lambda m: is_a(m, "GradientCheckpointingLayer"))
    layers = [name for name in found if not _INPUT_LISTS.search(name)]
    found = _with_unmarked(index, layers or found)
    recorded = getattr(module, "_can_record_outputs", None) or {}
    layer = recorded.get("hidden_states") if isinstance(recorded, dict) else None
    if not found and isinstance(layer, type):
        found = outermost(index, path, lambda m: isinstance(m, layer))
    if not found:
        least = elements(index, index.modules[path]) * _LEAST
        listed = _all_lists(index, path, least)
        return listed or longest_list(index, path) or repeated(index, path)
    blocks: Blocks = [(name,) for name in found]
    for tower in _towers_without(index, path, found):
        blocks += _like_layers(index, tower, elements(index, index.modules[path]) * _LEAST)
    return sorted(blocks, key=lambda b: min(index.order[n] for n in _names(index, b[0])))


def _with_unmarked(index: ModelIndex, found: list[str]) -> list[str]:
    """Layers, and their neighbours in the same list that aren't marked as layers (MobileViT)."""
    known = set(found)
    around = {part for name in found for part in _parents(name)}
    for owner in dict.fromkeys(index.owner(name) for name in found):
        for child, module in index.children(owner):
            plain = not re.search(r"emb|down|merg|norm", class_name(module).lower())
            if is_a(index.modules[owner], "ModuleList") and plain and child not in around:
                known.add(child)
    return [name for name in index.modules if name in known]


def _all_lists(index: ModelIndex, path: str, least: float) -> Blocks:
    """The members of every list of like modules that is a tower by its weight and its name."""
    blocks: Blocks = []
    seen: set[str] = set()
    for name in homogeneous_lists(index, path):
        if name in seen or _NO_TOWER.search(name) or is_below(name.rpartition(".")[2]):
            continue
        joined = with_siblings(index, name)
        seen.update(index.owner(member) for member in joined[0])
        if elements(index, index.modules[name]) >= least:
            blocks += joined
    return sorted(blocks, key=lambda b: min(index.order[n] for n in _names(index, b[0])))


def _towers_without(index: ModelIndex, path: str, found: Sequence[str]) -> list[str]:
    """Parts with a fair share of a model's weights that hold none of its known layers.

    In some models the layers of one tower are marked as such, and those of another aren't.
    """
    least = elements(index, index.modules[path]) * _LEAST
    holders = {part for name in found for part in _parents(name) if part.startswith(path)}
    holders.add(path)
    known = set(found)
    return [
        child
        for holder in holders
        for child, module in index.children(holder)
        if child not in holders
        and child not in known
        and elements(index, module) >= least
        and not _NO_TOWER.search(child.rpartition(".")[2])
    ]


def _like_layers(index: ModelIndex, tower: str, least: float) -> Blocks:
    """The layers of a tower: lists of like modules, or numbered ones, with half its weights."""
    module = index.modules[tower]
    if homogeneous(index, module):
        return [] if "emb" in tower.rpartition(".")[2] else with_siblings(index, tower)
    half = elements(index, module) / 2
    blocks = repeated(index, tower)
    numbered = len(blocks) > 1 and all(re.search(r"[a-z]\d+$", b[0]) for b in blocks)
    if not numbered:
        blocks = _all_lists(index, tower, least)
    return blocks if weight(index, blocks) >= half else []


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]
