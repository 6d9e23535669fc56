"""Backbone parameters and blocks -> an `Anatomy`: which tower each block and each part is in."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any

from lightning_freeze.model.discovery.anatomy import Anatomy, LayerGroup, Stack
from lightning_freeze.model.index import ModelIndex

# parts that stand above the blocks although some models register them first
_ABOVE = re.compile(
    r"^(?!.*emb)(.*pooler.*|(final|last|post|top)_.*|.*_(final|post)|ln_f|norm|norm_f|project_out"
    r"|logit_scale.*|logit_bias|temperature)$"
)
# parts that belong to the input although some models register them last
_BELOW = re.compile(r"emb|rel(ative)?_(pos|att)|position_bias")
# what leads from one tower to the next
_CONNECTOR = re.compile(
    r"project|connector|align|merger|adapt|resampler|perceiver|bridge|mm_|multi_?modal|downsampl"
)
_SENSES = re.compile(r"vis|image|img|video|audio|speech|protein|pixel")


def is_below(part: str) -> bool:
    """Whether a part is named like an input: an embedding.

    >>> is_below("embeddings"), is_below("decoder")
    (True, False)
    """
    return _BELOW.search(part) is not None


def is_above(part: str) -> bool:
    """Whether a part is named like what stands above the blocks: a final norm, a pooler.

    >>> is_above("final_layer_norm"), is_above("embed_norm")
    (True, False)
    """
    return _ABOVE.search(part) is not None


@dataclass
class _Tower:
    """A stack that is being put together: its blocks' places in the order of registration."""

    name: str
    places: list[int]
    first: int
    last: int


def assemble(
    index: ModelIndex,
    rule: str,
    core: Iterable[str],
    blocks: Sequence[LayerGroup],
    *,
    towers: bool = False,
    parallel: bool = False,
    adapters: Iterable[str] = (),
    tied: Iterable[str] = (),
) -> Anatomy:
    """Sort a backbone's parameters into stem, blocks and what is above them.

    Args:
        index: of the model.
        rule: which rule found the backbone.
        core: names of the backbone's parameters.
        blocks: in order of registration.
        towers: whether blocks under different containers are different stacks.
        parallel: whether several stacks stand side by side.
        adapters: names of what PEFT added.
        tied: names of a head that is a part of the backbone.
    """
    backbone = list(dict.fromkeys(core))
    members = set(backbone)
    head = tuple(name for name in index.parameters if name not in members)
    kept = _disjoint(blocks, members)
    added = tuple(name for name in dict.fromkeys(adapters) if name in members)
    more: dict[str, Any] = {"adapters": added, "tied": tuple(tied)}
    if not kept:
        stem = LayerGroup(stem_name(index, backbone), tuple(backbone)) if backbone else None
        return Anatomy(rule, stem, (), (), head, **more)
    base = common_path(backbone)
    found = _towers(kept, base, index) if towers else []
    if len(found) < 2:
        found = [_tower(index, stack_name(base, kept), kept, range(len(kept)))]
    elif not parallel:
        found.sort(key=lambda tower: _rank(kept[tower.places[0]].name.removeprefix(base + ".")))
    taken = {name for block in kept for name in block.parameters}
    below, above, extra = _Sorter(index, base, kept, found, parallel).sort(
        name for name in backbone if name not in taken
    )
    full = [
        LayerGroup(block.name, block.parameters + tuple(extra.get(place, ())))
        for place, block in enumerate(kept)
    ]
    stacks = tuple(Stack(t.name, tuple(full[place] for place in t.places)) for t in found)
    bottom = LayerGroup(stem_name(index, below), tuple(below)) if below else None
    if len(stacks) > 1:
        told = [f"`{stack.name}` ({len(stack.blocks)})" for stack in stacks]
        rule += ": stacks " + (" beside " if parallel else ", then ").join(told)
    return Anatomy(
        rule,
        bottom,
        tuple(block for stack in stacks for block in stack.blocks),
        tuple(above),
        head,
        stacks,
        parallel=parallel and len(stacks) > 1,
        **more,
    )


def _disjoint(blocks: Sequence[LayerGroup], members: set[str]) -> list[LayerGroup]:
    """The blocks' parameters that are in the backbone, shared ones in the first block alone."""
    kept: list[LayerGroup] = []
    seen: set[str] = set()
    for block in blocks:
        found = tuple(name for name in block.parameters if name in members and name not in seen)
        if found:
            seen.update(found)
            kept.append(LayerGroup(block.name, found))
    return kept


def _rank(name: str) -> int:
    """What comes in through the senses is first, then what is read, what joins both, a decoder."""
    if re.search(r"(^|[._])(decoder|predictor)", name):
        return 3
    if re.search(r"cross|fusion|multi_?modal|(^|\.)x_layers", name):
        return 2
    return 0 if _SENSES.search(name) else 1


def _tower(
    index: ModelIndex, name: str, kept: Sequence[LayerGroup], places: Iterable[int]
) -> _Tower:
    listed = list(places)
    order = index.order
    spans = [order[n] for place in listed for n in kept[place].parameters]
    return _Tower(name, listed, min(spans), max(spans))


def _towers(kept: Sequence[LayerGroup], base: str, index: ModelIndex) -> list[_Tower]:
    """Blocks whose paths differ only in numbers are one stack."""
    runs: dict[str, list[int]] = {}
    for place, block in enumerate(kept):
        runs.setdefault(re.sub(r"\d+", "#", block.name), []).append(place)
    paths = [common_path([kept[p].name + ".x" for p in places]) for places in runs.values()]
    containers = [
        path.rpartition(".")[0] if len(places) == 1 else path
        for path, places in zip(paths, runs.values())
    ]
    found = []
    for container, places in zip(containers, runs.values()):
        others = [other for other in containers if other != container]
        found.append(_tower(index, _shortest(container, base, others), kept, places))
    return found


def _shortest(container: str, base: str, others: Sequence[str]) -> str:
    """The shortest path below `base` that holds this container and none of the others."""
    parts = container.split(".")
    begin = len(base.split(".")) if base else 0
    for depth in range(begin + 1, len(parts) + 1):
        path = ".".join(parts[:depth])
        if not any(f"{other}.".startswith(path + ".") for other in others):
            return path
    return container


def stack_name(base: str, kept: Sequence[LayerGroup]) -> str:
    """Where a lone stack is: the backbone, or the container of its blocks at the model's top."""
    return base or common_path([block.name for block in kept])


class _Sorter:
    """Tells where the parts between, below and above the blocks belong."""

    def __init__(
        self,
        index: ModelIndex,
        base: str,
        kept: Sequence[LayerGroup],
        towers: Sequence[_Tower],
        parallel: bool,
    ) -> None:
        self.order = index.order
        self.base = base
        self.kept = kept
        self.towers = towers
        self.parallel = parallel
        starts = [min(self.order[name] for name in block.parameters) for block in kept]
        self.starts = starts
        in_order = sorted(zip(starts, range(len(starts))))
        self.firsts = [start for start, _ in in_order]
        # of the blocks that begin before it, the one that is highest in the stack
        self.highest = list(accumulate((place for _, place in in_order), max))
        self.last = max(self.order[name] for block in kept for name in block.parameters)
        # modules that hold blocks; their other children are the parts
        self.holders = {""}
        for block in kept:
            path = block.name
            while path := path.rpartition(".")[0]:
                self.holders.add(path)
        tops = [(self._inner(block.name).split(".")[0], s) for block, s in zip(kept, starts)]
        self.top_end: dict[str, int] = {}
        for top, start in tops:
            self.top_end[top] = max(start, self.top_end.get(top, 0))

    def sort(self, names: Iterable[str]) -> tuple[list[str], list[str], dict[int, list[str]]]:
        """Stem, above, and what goes with a block, by the block's place."""
        below: list[str] = []
        above: list[str] = []
        extra: dict[int, list[str]] = {}
        for name in names:
            place = self._alone(name) if len(self.towers) < 2 else self._among(name)
            if place == "below":
                below.append(name)
            elif place == "above":
                above.append(name)
            else:
                extra.setdefault(int(place), []).append(name)
        return below, above, extra

    def _inner(self, name: str) -> str:
        return name.removeprefix(self.base + ".") if self.base else name

    def _part(self, name: str) -> str:
        """The last component of the outermost module, or tensor, that holds no block."""
        path = ""
        for component in name.split("."):
            path = f"{path}.{component}" if path else component
            if path not in self.holders:
                return component
        return name.rpartition(".")[2]

    def _between(self, name: str) -> str | int:
        return self.highest[bisect_left(self.firsts, self.order[name]) - 1]

    def _alone(self, name: str) -> str | int:
        """One stack: by the order of registration, unless its name tells."""
        part, position = self._part(name), self.order[name]
        if position < self.firsts[0]:
            return "above" if _ABOVE.search(part) else "below"
        inner = self._inner(name)
        if position > self.last:
            return "below" if _BELOW.search(part) else "above"
        if _BELOW.search(inner) and self.top_end.get(inner.split(".")[0], -1) < position:
            return "below"  # an encoder's input, registered after its layers
        return self._between(name)

    def _among(self, name: str) -> str | int:
        """Several stacks: what belongs to a tower stays with it, its input with the stem."""
        part, position = self._part(name), self.order[name]
        homes = [t for t in self.towers if name.startswith(t.name + ".")]
        if not homes:
            around = self._around(name)
            if around:
                early = position < around[0].first and not _ABOVE.search(part)
                return "below" if early or _BELOW.search(part) else around[-1].places[-1]
            if _ABOVE.search(part):
                return "above"
            if _BELOW.search(part):
                return "below"
            if _CONNECTOR.search(part) and not self.parallel:
                return self._connected(part)
            if position > self.last:
                return "above"
            return "below" if position < self.firsts[0] else self._between(name)
        home = homes[0]
        top = home is self.towers[-1]
        if position < home.first:
            if not _ABOVE.search(part):
                return "below"
        elif position < home.last:
            inside = [p for p in home.places if self.starts[p] < position]
            return max(inside)
        elif _BELOW.search(part):
            return "below"
        return "above" if top else home.places[-1]

    def _around(self, name: str) -> list[_Tower]:
        """The towers of a part of the model that this parameter is in, if it isn't the top one."""
        path = ""
        for component in name.split("."):
            longer = f"{path}.{component}" if path else component
            if longer not in self.holders:
                break
            path = longer
        inside = [t for t in self.towers if t.name.startswith(path + ".")]
        return inside if inside and inside[-1] is not self.towers[-1] else []

    def _connected(self, part: str) -> int:
        """The top of the tower that a connector leads away from: the last before the decoder."""
        senses = [t for t in self.towers if _SENSES.search(self._inner(t.name))]
        named = [t for t in senses if part.split("_")[0] in self._inner(t.name)]
        origin = (named or senses or list(self.towers[:-1]))[-1]
        if origin is self.towers[-1]:
            origin = self.towers[-2]
        return origin.places[-1]


def common_path(names: Sequence[str]) -> str:
    """The deepest module path that all parameter names share.

    >>> common_path(["net.layer1.weight", "net.layer10.weight"])
    'net'
    """
    # between the first and the last in the order of the alphabet stand all others
    pairs = zip(*(name.split(".")[:-1] for name in (min(names), max(names))))
    return ".".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def stem_name(index: ModelIndex, names: Sequence[str]) -> str:
    """A module path if the stem is one module, else its parts: `electra.embeddings+project`."""
    base = common_path(names)
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
