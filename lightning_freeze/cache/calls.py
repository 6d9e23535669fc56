"""A traced step -> which calls of modules can be skipped.

What is skipped is a prefix of the calls: they come first, and nothing in them trains, minds its
mode or is watched from outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils._pytree import tree_leaves

from lightning_freeze.audit.moods import minds_its_mode

Trains = Callable[[nn.Parameter], bool]


@dataclass
class Node:
    """One call of a module, and the calls inside it.

    Attributes:
        grad: whether its output needed a gradient.
    """

    module: nn.Module | None
    children: list[Node] = field(default_factory=list)
    seconds: float = 0.0
    grad: bool = False

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
            node = Node(module)
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
        around: modules in whose calls they are called.
    """

    scope: nn.Module
    skipped: tuple[nn.Module, ...]
    seconds: float
    around: tuple[nn.Module, ...] = ()


def by_flag(parameter: nn.Parameter) -> bool:
    """Whether a parameter trains now."""
    return parameter.requires_grad


def find_prefix(root: Node, trains: Trains = by_flag) -> tuple[Prefix | None, str]:
    """The longest prefix in time that can be skipped, or None and the reason.

    Args:
        root: of a traced step.
        trains: whether a parameter trains; that of a later stage may be asked for.

    Returns:
        The prefix, and why it ends before the first layer that trains, if it does.
    """
    best: Prefix | None = None
    reason = ""
    for top in root.children:
        nodes: list[Node] = []
        stop = _lead(top, trains, nodes)
        reason = reason or _reason(top, stop, trains)
        if not any(_holds_weights(node.module) for node in nodes):
            continue
        seconds = sum(node.seconds for node in nodes)
        scope = _common(top, nodes)
        assert scope.module is not None
        modules = tuple(node.module for node in nodes if node.module is not None)
        if best is None or seconds > best.seconds:
            best = Prefix(scope.module, modules, seconds, _around(scope, nodes))
    return best, reason


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


def _reason(top: Node, stop: Node | None, trains: Trains) -> str:
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
    why = obstacle(stop.module, trains)
    if why is None:
        return ""
    return f"it ends before a {type(stop.module).__name__}, which isn't trained, but {why}"


def obstacle(module: nn.Module | None, trains: Trains = by_flag) -> str | None:
    """Why a module can't be skipped; None if it can."""
    if module is None:
        return "it is no module"
    for inner in module.modules():
        if any(trains(p) for p in inner._parameters.values() if p is not None):
            return "it trains"
        if is_compiled(inner):
            return f"{_in(inner, module)} is compiled"
        if inner.training and minds_its_mode(inner):
            return f"{_in(inner, module)} is in train mode"
        if foreign_hooks(inner):
            return f"{_in(inner, module)} has hooks"
    return None


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` was called on a module."""
    by_lightning = vars(module).get("_compiler_ctx")
    return bool(
        module._compiled_call_impl is not None
        or by_lightning is not None
        or type(module).__name__ == "OptimizedModule"
    )


def _in(inner: nn.Module, module: nn.Module) -> str:
    return "it" if inner is module else f"a {type(inner).__name__} in it"


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
