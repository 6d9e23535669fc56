"""Deep models: blocks that are alike are run once, the others stand in the graph as one operation.

Blocks are alike if nothing that a forward pass can see tells them apart: classes, settings, modes,
shapes and types of all their tensors, and those of the inputs they are called with. A number that
only says which block it is may differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_freeze.report.cost.graph import Backward

# fewer blocks are counted one by one: that takes no second
LEAST = 16
_NUMBERS = ("layer_idx", "layer_index", "layer_id", "layer_number", "block_idx", "layer_num")
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


class Counter(Protocol):
    """What counts.

    Attributes:
        repeated: FLOPs of what wasn't run again.
    """

    repeated: int

    def total(self) -> int:
        """FLOPs so far."""


class Opaque(Exception):
    """An argument or a setting that can't be compared."""


def run_alike_once(model: nn.Module, counter: Counter, least: int = LEAST) -> None:
    """Make the blocks of a model's long lists run once for all that are alike.

    Args:
        model: a copy that nobody else uses: its blocks' `forward` is replaced.
        counter: active when the model runs.
        least: length of a list from which on it is done.
    """
    for module in list(model.modules()):
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < least:
            continue
        kinds: dict[Any, list[nn.Module]] = {}
        for child in dict.fromkeys(module):
            if not any(True for _ in child.parameters()):
                continue
            try:
                kinds.setdefault(_kind(child), []).append(child)
            except Opaque:
                continue
        for alike in kinds.values():
            if len(alike) > 1:
                seen: dict[Any, _Run | None] = {}
                for child in alike:
                    runs = functools.partial(_run, child, child.forward, seen, counter)
                    child.forward = runs


class _Run:
    """One forward pass of a block, on inputs that are leaves of a graph of its own."""

    def __init__(self, block: Any, args: Any, counter: Counter) -> None:
        self._counter = counter
        self.own: list[int] = []
        leaves: list[Tensor] = []
        before = counter.total()
        args, kwargs = _mapped(args, lambda tensor: _leaf(tensor, leaves))
        versions = [tensor._version for tensor in leaves]
        self.output = block(*args, **kwargs)
        self.forward = counter.total() - before
        if versions != [tensor._version for tensor in leaves]:
            raise Opaque  # it writes to its inputs
        self._leaves = [id(leaf) for leaf in leaves if leaf.requires_grad]
        self._kept = leaves  # or their ids would be given to others
        self.made: list[Tensor] = []
        _mapped(self.output, self.made.append)
        self.trained = [tensor for tensor in self.made if tensor.requires_grad]
        self._graphs: dict[tuple[int, ...], Backward] = {}

    def count(self, used: Sequence[int], needed: Sequence[int], stages: int) -> list[int]:
        """FLOPs of its backward pass in each stage, if it were the block at some place.

        Args:
            used: which of its outputs get a gradient.
            needed: for each input that may need one, then for each parameter: in which stages.
            stages: how many there are.
        """
        key = tuple(used)
        if key not in self._graphs:
            self._graphs[key] = Backward([self.trained[i] for i in used], self._counter.total)
        return self._graphs[key].count(dict(zip([*self._leaves, *self.own], needed)), stages)


class Repeated(torch.autograd.Function):
    """A block that was run elsewhere, as one operation of the graph."""

    @staticmethod
    def forward(ctx: Any, run: Any, *tensors: Tensor) -> Any:
        """Outputs of the right shapes."""
        ctx.block = run
        return tuple(torch.empty_like(tensor) for tensor in run.trained)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Never: such a graph is only looked at."""
        raise NotImplementedError


def _run(
    block: nn.Module,
    forward: Any,
    seen: dict[Any, _Run | None],
    counter: Counter,
    *args: Any,
    **kwargs: Any,
) -> Any:
    try:
        key = _plain((args, kwargs))
    except Opaque:
        return forward(*args, **kwargs)
    own = [parameter for parameter in block.parameters() if parameter.requires_grad]
    run = seen.get(key)
    if run is not None:
        counter.repeated += run.forward
    elif key not in seen:
        before = counter.total()
        try:
            run = seen[key] = _Run(forward, (args, kwargs), counter)
            run.own = [id(parameter) for parameter in own]
        except (Opaque, RuntimeError):  # the latter where an input must not be written to
            counter.repeated -= counter.total() - before
            seen[key] = None
    if run is None:
        return forward(*args, **kwargs)
    tensors: list[Tensor] = []
    _mapped((args, kwargs), tensors.append)
    inputs = [tensor for tensor in tensors if tensor.requires_grad]
    apply: Any = Repeated.apply
    made = iter(apply(run, *inputs, *own) if run.trained else ())
    return _mapped(run.output, lambda t: next(made) if t.requires_grad else torch.empty_like(t))


def _leaf(tensor: Tensor, leaves: list[Tensor]) -> Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        made = torch.empty_strided(
            tensor.shape,
            tensor.stride(),
            dtype=tensor.dtype,
            device=tensor.device,
            requires_grad=tensor.requires_grad,
        )
    else:
        made = torch.empty_like(tensor)
    leaves.append(made)
    return made


def _mapped(content: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(content, Tensor):
        return change(content)
    if isinstance(content, (tuple, list)):
        return type(content)(_mapped(item, change) for item in content)
    if isinstance(content, dict):
        return {key: _mapped(value, change) for key, value in content.items()}
    return content


def _plain(content: Any) -> Any:
    """All that a forward pass can tell of its arguments, as something to look up."""
    if isinstance(content, Tensor):
        return (
            tuple(content.shape), content.stride(), content.dtype, content.device,
            content.requires_grad,
        )  # fmt: skip
    if type(content) in (tuple, list):
        return type(content), tuple(_plain(item) for item in content)
    if type(content) is dict:
        return tuple((key, _plain(value)) for key, value in content.items())
    if isinstance(content, _PLAIN):
        return type(content), content
    raise Opaque


def _kind(block: nn.Module) -> Any:
    """All that can tell a block from another, but its number."""
    found: list[Any] = []
    for path, module in block.named_modules(remove_duplicate=False):
        if any(vars(module).get(name) for name in ("_forward_hooks", "_forward_pre_hooks")):
            raise Opaque
        if "forward" in vars(module):
            raise Opaque
        settings = [
            (name, _setting(value))
            for name, value in sorted(vars(module).items())
            if name not in _NUMBERS and name not in ("_modules", "_parameters", "_buffers")
        ]
        tensors = [
            (name, None if tensor is None else _plain(tensor))
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
        ]
        found.append((path, type(module), tuple(settings), tuple(tensors)))
    return tuple(found)


def _setting(value: Any) -> Any:
    try:
        return _plain(value)
    except Opaque:
        pass
    if not value and isinstance(value, (dict, set)):
        return type(value), ()
    return id(value)  # shared by the blocks, such as a config, or a reason to run both
