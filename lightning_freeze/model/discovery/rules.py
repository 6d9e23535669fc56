"""Model -> its anatomy: where the backbone, its blocks and the head are.

The rules, in this order; the first that finds something wins and is named in the result:

1. a `backbone` or `feature_extractor` attribute with parameters beside it: the author said so;
2. timm (`group_matcher`, `get_classifier`), 3. transformers (`base_model`), 4. torchvision
   (`features` or `layer1..4` or `encoder.layers` under a `classifier`, `fc`, `heads` or `head`);
   wherever in the model it is: inside a LightningModule, PEFT's wrapper, or sentence-transformers;
5. an `encoder` attribute with parameters beside it;
6. a model that is a plain `nn.Sequential`, whose last layer is the head;
7. the longest list of modules of one class; 8. a part that is named like a head, such as
   `classifier`, and all that is beside it.

Rules 1 and 5 to 8 look in the model and in the model that it wraps, which may have a loss with
tensors of its own beside it. What was frozen before, beside a model that trains, isn't looked at:
it is there to be asked, as a perceptual loss or a teacher is. Where a part of the same class, with
tensors of its own, trains beside what was found, nobody but the user knows which is meant.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace

from lightning_freeze.errors import DiscoveryError
from lightning_freeze.model.discovery.adapters import adapter_names, is_wrapped
from lightning_freeze.model.discovery.anatomy import Anatomy, LayerGroup
from lightning_freeze.model.discovery.assembly import assemble, common_path, is_above
from lightning_freeze.model.discovery.blocks import (
    Blocks,
    class_name,
    homogeneous_lists,
    is_a,
    is_list,
    longest_list,
    numbered,
    repeated,
    sequential,
    weight,
    with_siblings,
)
from lightning_freeze.model.discovery.zoo import (
    as_groups,
    blocks_of,
    has_task,
    in_zoo_model,
    kind_of,
    zoo_models,
)
from lightning_freeze.model.index import ModelIndex, shape_of, some
from lightning_freeze.model.selectors import Selectors, label_of, select

_TOWER = re.compile(r"(encoder|decoder|tower|branch|stream|net|model|expert)s?_?\d+$")
_HEAD = re.compile(
    r"(.*_)?(head|heads|classifier|classif|logits|predictor|regressor)|fc|fc_out|out|output"
    r"|output_layer|out_proj|proj_out|score|readout|generator"
)
# what a loss brings along: parts of it, tensors that weigh or scale it, networks that it asks
_OF_A_LOSS = re.compile(
    r"(^|_)(loss(es|_?fns?)?|criteri(on|a)|metrics?|temperature|logit_(scale|bias)|log_(var|sigma)s?"
    r"|teacher|momentum|ema|target|reference)(_|$)|perceptual|lpips"
)
# what stands on a backbone
_UPPER = re.compile(r"head|classif|decoder|neck|proj|pool|adapter|predictor|^fc|^out")
_SAID = ("backbone", "feature_extractor", "encoder")


def discover(index: ModelIndex) -> Anatomy:
    """Find backbone, blocks and head, once for an index; the module docstring lists the rules.

    Raises:
        DiscoveryError: no rule applies, or several models could be the one that is meant.
    """
    if "anatomy" not in index.found:
        index.found["anatomy"] = _discover(index)
    anatomy: Anatomy = index.found["anatomy"]
    return anatomy


def _discover(index: ModelIndex) -> Anatomy:
    asked = _only_asked(index)
    lossy = [path for path in asked if _OF_A_LOSS.search(path.rpartition(".")[2])]
    for apart in dict.fromkeys((tuple(asked), tuple(lossy))):
        if not apart:
            continue
        left = ModelIndex.of(index.modules[""], without=[index.modules[p] for p in apart])
        # a part that is frozen, and not named so, is as likely the backbone of what trains
        surely = apart != tuple(lossy)
        with suppress(DiscoveryError) if surely else nullcontext():
            found = _search(left, surely=surely)
            if found is not None:
                inside = frozenset(found.backbone).union(found.adapters)
                return replace(found, head=tuple(n for n in index.parameters if n not in inside))
    found = _search(index)
    if found is None:
        raise _not_found(index)
    return found


def _only_asked(index: ModelIndex) -> list[str]:
    """Parts that were frozen beside others that train, and parts of a loss that hold such."""
    library = any(kind_of(index.modules[root]) for root in index.roots)
    asked = []
    for path, module in index.children(index.roots[-1]):
        name = path.rpartition(".")[2]
        frozen = [not tensor.requires_grad for tensor in index.tensors(index.within(module))]
        of_a_loss = _OF_A_LOSS.search(name) is not None
        if name not in _SAID and (of_a_loss or not library) and any(frozen):
            asked += [path] if of_a_loss or all(frozen) else []
    return asked if any(p.requires_grad for p in index.parameters.values()) else []


def _search(index: ModelIndex, *, surely: bool = False) -> Anatomy | None:
    """What the first rule finds that finds something.

    Args:
        index: of the model, or of a part of it.
        surely: whether only those rules count that know a backbone when they see one.

    Raises:
        DiscoveryError: several models could be the one that is meant.
    """
    said = _roots(index, said=True)
    for root in said:
        module = index.modules[root]
        kind = kind_of(module)
        if kind != "transformers" or has_task(module):
            found = _by_attribute(index, root, ("backbone", "feature_extractor"))
            if found:
                return _alone(index, found, root)
        if kind:
            break  # what a part of a library's model calls its backbone is a part of that
    zoo = zoo_models(index)
    if len(zoo) == 1:
        found = in_zoo_model(index, *zoo[0])
        return None if surely and _is_upper(index, found) else _alone(index, found, zoo[0][0])
    if len(zoo) > 1:
        raise _several(index, [path for path, _ in zoo])
    roots = _roots(index)
    for rule in (_by_encoder, _by_list) if surely else (_by_encoder, _by_order, _by_list, _by_head):
        for root in reversed(said if rule is _by_encoder else roots):
            found = rule(index, root)
            if found and not (surely and _is_upper(index, found)):
                at = root if rule is _by_encoder else common_path(found.backbone)
                return _alone(index, found, at)
    return None


def _is_upper(index: ModelIndex, found: Anatomy) -> bool:
    """Whether a backbone is in a part that is named like what stands on one."""
    if not found.backbone:
        return True
    inside = common_path(found.backbone).removeprefix(index.roots[-1]).strip(".")
    return _UPPER.search(inside.partition(".")[0]) is not None


def _alone(index: ModelIndex, found: Anatomy, at: str) -> Anatomy:
    """What was found at a path, if there isn't a second tower like the one that holds it.

    Raises:
        DiscoveryError: there is.
    """
    core = frozenset(found.backbone)
    paths = [block.name for block in found.blocks]
    named = [p for p in paths if _TOWER.search(p) or not re.search(r"\d$|\d\.", p)]
    if len(named) == len(paths) > 1 and (
        numbered(index, named[0]) or homogeneous_lists(index, named[0])
    ):
        twins = [path for path in named if _twins(index, named[0], path)]
        if len(twins) > 1:
            raise _several(index, twins)
    while at:
        around = index.owner(at)
        beside = [
            path
            for path, other in index.children(around)
            if core.isdisjoint(index.within(other)) and _twins(index, at, path)
        ]
        if beside:
            raise _several(index, [at, *beside])
        at = around
    return found


def _twins(index: ModelIndex, path: str, other: str) -> bool:
    """Whether two parts are of one class and hold tensors of the same shapes, and both train."""
    one, two = index.modules[path], index.modules[other]
    held = [index.tensors(index.within(module)) for module in (one, two)]
    return (
        class_name(one) == class_name(two)
        and not is_list(one)
        and all(any(tensor.requires_grad for tensor in tensors) for tensors in held)
        and [*map(shape_of, held[0])] == [*map(shape_of, held[1])]
    )


def _several(index: ModelIndex, paths: Sequence[str]) -> DiscoveryError:
    kinds = dict.fromkeys(class_name(index.modules[path]) for path in paths)
    both = ", ".join(f'"{path}"' for path in paths)
    return DiscoveryError(
        f"Several models could hold the backbone: {some([f'`{path}`' for path in paths])} "
        f"({', '.join(kinds)}). Name one, as in "
        f'`FreezeBackbone(backbone="{paths[0]}")`, or several, as in `FreezeBackbone([{both}])`; '
        "or give `groups`."
    )


def _roots(index: ModelIndex, *, said: bool = False) -> list[str]:
    """The model, and what it wraps, beside no more than parts of a loss, outermost first.

    Args:
        index: of the model.
        said: whether it is to be searched for what an author calls a backbone; then a layer of
            the author's own that stands beside it, as of a metric loss, is no part of it either.
    """
    roots = list(index.roots)
    while True:
        root = roots[-1]
        prefix = root + "." if root else ""
        parts = index.children(root)
        inside = [path for path, module in parts if not _is_of_a_loss(index, path, said)]
        own = [n for n in index.within(index.modules[root]) if "." not in n.removeprefix(prefix)]
        loose = all(len(shape_of(index.parameters[name])) < 2 for name in own)
        if len(inside) != 1 or not loose or is_a(index.modules[inside[0]], "ModuleList"):
            return roots
        if len(parts) > 1 and is_list(index.modules[root]):
            return roots
        roots.append(inside[0])


def _is_of_a_loss(index: ModelIndex, path: str, own: bool) -> bool:
    module, name = index.modules[path], path.rpartition(".")[2]
    if _OF_A_LOSS.search(name):
        return True
    bare = all(len(shape_of(tensor)) < 2 for tensor in index.tensors(index.within(module)))
    own = own and not index.children(path) and not type(module).__module__.startswith("torch.")
    return (bare or own) and not _HEAD.fullmatch(name)


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
            inner = zoo_models(index, path)
            # what is injected into a backbone of the author's own is a part of it
            adapters = adapter_names(index, path) if inner or is_wrapped(index) else ()
            rule = f"the attribute `{path}`" + (", with PEFT adapters" if adapters else "")
            blocks = blocks_of(index, *inner[0]) if len(inner) == 1 else []
            blocks = blocks or repeated(index, path)
            towers = bool(inner) and inner[0][1] == "transformers"
            return assemble(
                index, rule, core, as_groups(index, blocks), towers=towers, adapters=adapters
            )
    return None


def _by_encoder(index: ModelIndex, root: str) -> Anatomy | None:
    return _by_attribute(index, root, ("encoder",))


def _by_order(index: ModelIndex, root: str) -> Anatomy | None:
    module = index.modules[root]
    if not is_a(module, "Sequential") or len(index.children(root)) < 2:
        return None
    blocks = sequential(index, root)[:-1]
    if not blocks:
        return None
    core = [n for paths in blocks for p in paths for n in index.within(index.modules[p])]
    rule = f"the order of the Sequential `{root or class_name(module)}`"
    return _assembled(index, rule, core, blocks)


def _assembled(index: ModelIndex, rule: str, core: Sequence[str], blocks: Blocks) -> Anatomy:
    adapters = adapter_names(index) if is_wrapped(index) else ()
    return assemble(index, rule, core, as_groups(index, blocks), adapters=adapters)


def _heads(index: ModelIndex, root: str) -> dict[str, tuple[str, ...]]:
    """Children that are named like a head, and their parameters."""
    found = index.children(root)
    heads = {
        path: index.within(module)
        for path, module in found
        if _HEAD.fullmatch(path.rpartition(".")[2]) and not is_a(module, "ModuleList")
    }
    return heads if len(heads) < len(found) else {}


def _by_list(index: ModelIndex, root: str) -> Anatomy | None:
    heads = {name for names in _heads(index, root).values() for name in names}
    blocks = longest_list(index, root)
    if heads.intersection(*(index.within(index.modules[p]) for paths in blocks[:1] for p in paths)):
        lists = [
            listed
            for listed in (with_siblings(index, path) for path in homogeneous_lists(index, root))
            if heads.isdisjoint(index.within(index.modules[listed[0][0]]))
        ]
        blocks = max(lists, key=len, default=[])
    what = "the list of like modules"
    others = [b for b in numbered(index, root) if heads.isdisjoint(_names(index, [b]))]
    inside = any((b[0] + ".").startswith(other + ".") for b in blocks[:1] for (other,) in others)
    lighter = weight(index, blocks) < weight(index, others) / 2
    if len(others) > 1 and (inside or lighter) and not _TOWER.search(others[0][0]):
        blocks, what = others, "the numbered modules"
    if not blocks:
        return None
    pair = index.owner(blocks[0][0]).replace("decoder", "encoder")
    if pair != index.owner(blocks[0][0]) and pair in homogeneous_lists(index, root):
        blocks = with_siblings(index, pair) + blocks  # of a torch.nn.Transformer
    order = index.order
    last = max(order[name] for name in _names(index, blocks))
    prefix = root + "." if root else ""
    core = [
        name
        for name in index.within(index.modules[root])
        if name not in heads
        and (order[name] <= last or (heads and is_above(name.removeprefix(prefix).split(".")[0])))
    ]
    if len(core) == len(index.within(index.modules[root])):
        return None
    place = index.owner(blocks[0][0]) or class_name(index.modules[""])
    if what == "the numbered modules":
        place = f"{blocks[0][0]}` ... `{blocks[-1][0]}"
    return _assembled(index, f"{what} `{place}`", core, blocks)


def _names(index: ModelIndex, blocks: Blocks) -> list[str]:
    return [name for paths in blocks for p in paths for name in index.within(index.modules[p])]


def _by_head(index: ModelIndex, root: str) -> Anatomy | None:
    heads = _heads(index, root)
    if not heads or is_a(index.modules[root], "ModuleList"):
        return None
    head = {name for names in heads.values() for name in names}
    inside = index.within(index.modules[root])
    core = [name for name in inside if name not in head]
    blocks = repeated(index, root, [path.rpartition(".")[2] for path in heads])
    if not core or not blocks:
        return None
    return _assembled(index, f"the name of the head, `{', '.join(heads)}`", core, blocks)


def backbone_at(index: ModelIndex, selectors: Selectors) -> Anatomy:
    """The backbone that a user names, with its blocks where they can be found.

    Of a model with several stacks only those blocks count that are in what is named.

    Raises:
        SelectorError: a selector matches nothing.
    """
    core = select(index, selectors)
    rule = f"`backbone={label_of(selectors)}`"
    members = set(core)
    towers = parallel = False
    try:
        whole = discover(index)
    except DiscoveryError:
        whole = None
    found: list[LayerGroup] = []
    for candidate in (whole, *(_zoo_around(index, members) if whole is None else ())):
        if candidate is not None and not found:
            found = [b for b in _pure(index, candidate) if set(b.parameters) <= members]
            towers, parallel = len(candidate.stacks) > 1, candidate.parallel
    if not found:
        for path, module in index.modules.items():
            if index.within(module) == core:
                found = as_groups(index, repeated(index, path))
                break
    return assemble(index, rule, core, found, towers=towers, parallel=parallel)


def _pure(index: ModelIndex, found: Anatomy) -> list[LayerGroup]:
    """Blocks in order of registration, without what stands between them."""
    blocks = []
    for block in found.blocks:
        module = index.modules.get(block.name)
        own = set(index.within(module)) if module is not None else set(block.parameters)
        alone = tuple(name for name in block.parameters if name in own)
        blocks.append(LayerGroup(block.name, alone or block.parameters))
    return sorted(blocks, key=lambda block: index.order[block.parameters[0]])


def _zoo_around(index: ModelIndex, members: set[str]) -> list[Anatomy]:
    """The library's model that a named backbone is, or is inside of, where that is one."""
    zoo = [
        (path, kind)
        for path, kind in zoo_models(index)
        if not members.isdisjoint(index.within(index.modules[path]))
    ]
    return [in_zoo_model(index, *zoo[0])] if len(zoo) == 1 else []


def _not_found(index: ModelIndex) -> DiscoveryError:
    parts = [f"`{name}` ({class_name(m)})" for name, m in index.children("")]
    parts += [f"`{name}`" for name in index.parameters if "." not in name]
    lists = homogeneous_lists(index, "") if parts else []
    names = [name for name, _ in index.children("")]
    names = names + [name for name in index.parameters if "." not in name]
    listed = ", ".join(_described(index, name) for name in lists)
    likely = [name for name in lists if name][:1] or names[:-1] or names
    advice = (
        f"Say it yourself: `FreezeBackbone(backbone={_quoted(likely)})`, or "
        f"`GradualUnfreeze(groups={names})`, bottom to top."
    )
    return DiscoveryError(
        "No backbone was found: there is no timm, transformers or torchvision model, no "
        "attribute `backbone`, `feature_extractor` or `encoder` with a head beside it, and no "
        f"list of like layers below a head. The model has: {', '.join(parts) or 'no parameters'}. "
        + (f"Lists of like modules: {listed}. " if listed else "")
        + (advice if parts else "There is nothing to freeze.")
    )


def _quoted(names: Sequence[str]) -> str:
    return f'"{names[0]}"' if len(names) == 1 else str(list(names))


def _described(index: ModelIndex, path: str) -> str:
    members: Blocks = [(child,) for child, _ in index.children(path)]
    kind = class_name(index.modules[members[0][0]])
    return f"`{path or class_name(index.modules[''])}` ({len(members)} {kind})"
