"""A traced step -> which calls of modules can be skipped.

What is skipped is a prefix of the calls: they come first, and nothing in them trains, minds its
mode or is watched from outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils._pytree import tree_leaves

from lightning_freeze.audit.moods import is_dropout, minds_its_mode

Trains = Callable[[nn.Parameter], bool]

_TRAIN_MODE = "is in train mode"


@dataclass
class Node:
    """One call of a module, and the calls inside it.

    Attributes:
        grad: whether its output needed a gradient.
        recorded: whether gradients were recorded at all.
    """

    module: nn.Module | None
    children: list[Node] = field(default_factory=list)
    seconds: float = 0.0
    grad: bool = False
    recorded: bool = True

    def walk(self) -> Iterator[Node]:
        """This call and all inside, in order."""
        yield self
        for child in self.children:
            yield from child.walk()


@contextmanager
def traced(model: nn.Module) -> Iterator[Node]:
    """Note the calls of a model's modules while the block runs."""
    root = Node(None)
    open_nodes = [root]
    known = set(model.modules())
    began: list[float] = []

    def enter(module: nn.Module, args: Any) -> None:
        if module in known:
            node = Node(module, recorded=torch.is_grad_enabled())
            open_nodes[-1].children.append(node)
            open_nodes.append(node)
            began.append(time.perf_counter())

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module in known and len(open_nodes) > 1:
            node = open_nodes.pop()
            node.seconds = time.perf_counter() - began.pop()
            tensors = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            node.grad = any(tensor.requires_grad for tensor in tensors)

    handles = [
        torch_modules.register_module_forward_pre_hook(enter),
        torch_modules.register_module_forward_hook(leave),
    ]
    try:
        yield root
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Prefix:
    """What can be skipped.

    Attributes:
        scope: the module whose call has all of it inside.
        skipped: the calls' modules, in order; the scope itself if all of it is frozen.
        seconds: what they took in the traced step.
        around: modules in whose calls they are called, the scope first.
        late: what trains was called before, so what they are given may depend on it some day.
    """

    scope: nn.Module
    skipped: tuple[nn.Module, ...]
    seconds: float
    around: tuple[nn.Module, ...] = ()
    late: bool = False


def by_flag(parameter: nn.Parameter) -> bool:
    """Whether a parameter trains now."""
    return parameter.requires_grad


def find_prefix(
    root: Node,
    trains: Trains = by_flag,
    names: Mapping[nn.Module, str] = MappingProxyType({}),
) -> tuple[Prefix | None, str]:
    """The longest prefix in time that can be skipped, or None and the reason.

    Where what trains comes first, such as one of two towers, it may be a call of its own that
    nothing before has an influence on.

    Args:
        root: of a traced step.
        trains: whether a parameter trains; that of a later stage may be asked for.
        names: module -> its path, for the reason.

    Returns:
        The prefix, and why it ends before the first layer that trains, if it does.
    """
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        return None, "there are hooks on all modules, of `register_module_forward_hook` or alike"
    best: Prefix | None = None
    reason = ""
    for top in root.children:
        nodes: list[Node] = []
        stop = _lead(top, trains, nodes)
        nodes, watched = _unwatched(top, nodes)
        reason = reason or _reason(top, watched or stop, nodes, trains, names)
        if any(_holds_weights(node.module) for node in nodes):
            best = _longer(best, _prefix(_common(top, nodes), nodes))
    if best is None:
        trained = {node.module for node in root.walk() if node.grad}
        for node in _apart(root, trains, trained):
            best = _longer(best, _prefix(node, [node], late=True))
    return best, reason


def _prefix(scope: Node, nodes: Sequence[Node], *, late: bool = False) -> Prefix:
    assert scope.module is not None
    modules = tuple(node.module for node in nodes if node.module is not None)
    seconds = sum(node.seconds for node in nodes)
    return Prefix(scope.module, modules, seconds, _around(scope, nodes), late)


def _longer(one: Prefix | None, other: Prefix) -> Prefix:
    return other if one is None or other.seconds > one.seconds else one


def _apart(node: Node, trains: Trains, trained: Set[Any]) -> Iterator[Node]:
    """Frozen calls that no gradient goes through, as what trains isn't in front of them."""
    free = _holds_weights(node.module) and node.module not in trained and node.recorded
    if free and obstacle(node.module, trains) is None:
        yield node
        return
    for child in node.children:
        yield from _apart(child, trains, trained)


def _unwatched(top: Node, nodes: list[Node]) -> tuple[list[Node], Node | None]:
    """What comes before the first call that has hooks and some of the skipped calls inside.

    Hooks on the scope itself don't matter: they run before and after its `forward`.
    """
    stop = None
    while nodes:
        scope = _common(top, nodes)
        around = set(_around(scope, nodes)) - {scope.module}
        watched = (n for n in scope.walk() if n.module in around and foreign_hooks(n.module))
        found = next(watched, None)
        if found is None:
            break
        stop = found
        inside = {id(node) for node in stop.walk()}
        nodes = nodes[: [id(node) in inside for node in nodes].index(True)]
    return nodes, stop


def _around(scope: Node, nodes: Sequence[Node]) -> tuple[nn.Module, ...]:
    inside = {id(node) for node in nodes}
    modules = [
        node.module
        for node in scope.walk()
        if node.module is not None
        and id(node) not in inside
        and any(id(inner) in inside for inner in node.walk())
    ]
    return tuple(dict.fromkeys(modules))


def _holds_weights(module: nn.Module | None) -> bool:
    return module is not None and next(module.parameters(), None) is not None


def _lead(node: Node, trains: Trains, found: list[Node]) -> Node | None:
    """Add the calls at its beginning that can be skipped; returns the first that can't."""
    # what has no weights may work on what trains: parametrizations do
    on_trained = node.grad and not _holds_weights(node.module)
    if obstacle(node.module, trains) is None and not on_trained:
        found.append(node)
        return None
    for child in node.children:
        stop = _lead(child, trains, found)
        if stop is not None:
            return stop
    return node


def _reason(
    top: Node,
    stop: Node | None,
    nodes: Sequence[Node],
    trains: Trains,
    names: Mapping[nn.Module, str],
) -> str:
    """Why a prefix ends where it does; "" if what trains comes next."""
    if stop is None or stop.module is None:
        return ""
    if any(trains(p) for p in stop.module.parameters()):
        return ""
    behind = False
    for node in top.walk():
        behind = behind or node is stop
        own = () if node.module is None else node.module._parameters.values()
        if behind and any(p is not None for p in own):
            if any(p is not None and trains(p) for p in own):
                return ""
            break
    found = obstacle(stop.module, trains)
    covered = {id(inner) for node in nodes for inner in node.walk()}
    weighty = [node for node in stop.walk() if _holds_own_weights(node.module)]
    if found is None or (weighty and all(id(node) in covered for node in weighty)):
        return ""
    inner, why = found
    kind = f"a {type(stop.module).__name__}"
    path = names.get(stop.module)
    where = f"it ends before `{path}`, {kind}," if path else f"it ends before {kind},"
    if inner is not stop.module:
        why = f"`{names[inner]}` in it {why}" if inner in names else f"a part of it {why}"
    return f"{where} which isn't trained, but {why}{_advice(inner, why, names)}"


def _advice(module: nn.Module, why: str, names: Mapping[nn.Module, str]) -> str:
    """What to write where a mode is in the way."""
    path = names.get(module)
    if not path or _TRAIN_MODE not in why:
        return ""
    write = f"{path}.p = 0.0" if is_dropout(module) else f"{path}.eval()"
    return f" (if that isn't wanted, write `{write}` before the fit)"


def _holds_own_weights(module: nn.Module | None) -> bool:
    return module is not None and any(p is not None for p in module._parameters.values())


def obstacle(module: nn.Module | None, trains: Trains = by_flag) -> tuple[nn.Module, str] | None:
    """What in a module keeps it from being skipped, and why; None if nothing does."""
    if module is None:
        return nn.Module(), "is no module"
    for inner in module.modules():
        if any(trains(p) for p in inner._parameters.values() if p is not None):
            return inner, "trains"
        if is_compiled(inner):
            return inner, "is compiled"
        if inner.training and minds_its_mode(inner):
            return inner, _TRAIN_MODE
        if foreign_hooks(inner):
            return inner, "has hooks"
    return None


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` was called on a module."""
    by_lightning = vars(module).get("_compiler_ctx")
    return bool(
        module._compiled_call_impl is not None
        or by_lightning is not None
        or type(module).__name__ == "OptimizedModule"
    )


def foreign_hooks(module: nn.Module) -> list[Any]:
    """Hooks on a module that aren't ours."""
    hooks: list[Any] = []  # those of torch.nn.utils belong to how a weight is made
    for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        hooks += getattr(module, table, {}).values()
    known = (__name__.partition(".")[0], "torch.nn.utils")
    return [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith(known)]


def _common(node: Node, nodes: Sequence[Node]) -> Node:
    """The innermost call that has some calls inside, or is the only one of them."""
    if list(nodes) == [node]:
        return node
    for child in node.children:
        inside = {id(n) for n in child.walk()}
        if all(id(n) in inside for n in nodes):
            return _common(child, nodes)
    return node
