"""Does what trains get gradients? Who has waited too long, and why: its forward pass is looked at.

Reasons are from public threads: huggingface/transformers issues 23170 and 26221 (reentrant
checkpointing), haotian-liu/LLaVA issue 1173 (`no_grad`), huggingface/trl issue 1936 (an output
that nothing uses), pytorch/pytorch issue 139476 (a compiled graph).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_freeze.model.index import ModelIndex, clean

Why = tuple[str, str]

_USE_IT = (
    "Use its output in the loss, or freeze it; raise `dead_after` if it is used rarely, or name it "
    "in `ignore` if it is meant to get none."
)


@dataclass
class _Gap:
    """Steps in a row without a gradient: now, the most before, and at the last epoch's end."""

    steps: int = 0
    longest: int = 0
    at_border: int = 0
    told: bool = False


@dataclass
class GradientWatch:
    """Which parameters that train have had a gradient, and how long the others have waited.

    Of those that have had one it notes in how many steps of their optimizer in a row they have had
    none: who stops getting gradients for good, is told of (see `lost`).

    Attributes:
        dead_after: optimizer steps without a gradient after which one counts as dead.
        asked: whether any optimizer has stepped.
    """

    dead_after: int
    _waiting: dict[str, list[Any]] = field(default_factory=dict)
    _alive: set[str] = field(default_factory=set)
    _parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)
    _held: dict[int, tuple[tuple[int, ...], list[tuple[str, nn.Parameter]]]] = field(
        default_factory=dict
    )
    _gaps: dict[str, _Gap] = field(default_factory=dict)
    asked: bool = False

    def arm(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Watch these from now on; what had a gradient before isn't waited for again."""
        self._parameters = parameters
        self._held, self._gaps = {}, {}
        self._alive.intersection_update(parameters)
        self._waiting = {
            name: self._waiting.get(name) or [parameter, 0]
            for name, parameter in parameters.items()
            if name not in self._alive
        }

    def before_step(self, optimizer: Optimizer) -> list[str]:
        """Look at the gradients before a step; returns who has just been found dead."""
        self.asked = True
        self._note_gaps(optimizer)
        if not self._waiting:
            return []
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        dead = []
        for name, entry in list(self._waiting.items()):
            if id(entry[0]) not in held:
                continue
            if entry[0].grad is not None:
                self._alive.add(name)
                del self._waiting[name]
            else:
                entry[1] += 1
                if entry[1] == self.dead_after:
                    dead.append(name)
        return dead

    def _note_gaps(self, optimizer: Optimizer) -> None:
        lengths = tuple(len(group["params"]) for group in optimizer.param_groups)
        known = self._held.get(id(optimizer))
        if known is None or known[0] != lengths:
            ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
            pairs = [(name, p) for name, p in self._parameters.items() if id(p) in ids]
            known = self._held[id(optimizer)] = (lengths, pairs)
        without = [name for name, parameter in known[1] if parameter.grad is None]
        if without or self._gaps:
            missing = set(without).intersection(self._alive)
            for name, parameter in known[1]:
                gap = self._gaps.get(name)
                if name in missing:
                    gap = self._gaps.setdefault(name, _Gap()) if gap is None else gap
                    gap.steps += 1
                elif gap is not None and parameter.grad is not None:
                    gap.longest, gap.steps = max(gap.longest, gap.steps), 0

    def lost(self) -> dict[str, int]:
        """Who had gradients and has stopped getting them: name -> steps without one.

        Asked at an epoch's end. Who is used now and then isn't lost: it has to be twice as long as
        it ever took before, `dead_after` steps at least, and so already when the epoch began.
        """
        found = {}
        for name, gap in self._gaps.items():
            least = max(self.dead_after, 2 * gap.longest)
            if gap.steps >= least and not gap.told and gap.at_border:
                gap.told = True
                found[name] = gap.steps
            gap.at_border = gap.steps
        return found

    def nearly_dead(self) -> list[str]:
        """Those that will be found dead at the next step unless they get a gradient in it."""
        return [name for name, entry in self._waiting.items() if entry[1] == self.dead_after - 1]

    @property
    def waits(self) -> bool:
        """Whether any parameter has never had a gradient at a step."""
        return bool(self._waiting)

    @property
    def alive(self) -> frozenset[str]:
        """Names that have had a gradient since they began to train."""
        return frozenset(self._alive)


@dataclass
class _Calls:
    """What was seen of a module's forward passes."""

    count: int = 0
    with_gradient: int = 0
    checkpointed: int = 0


class Probe:
    """Looks at the forward passes of modules whose parameters get no gradient.

    Hooks are on modules and parameters until `stop`; nothing else is changed.

    Example:
        >>> model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
        >>> probe = Probe(ModelIndex.of(model), ["used.weight", "unused.weight"])
        >>> with torch.no_grad():
        ...     _ = model["used"](torch.ones(1, 2))
        >>> probe.stop()
        >>> probe.why("used.weight")[0]
        'Its forward pass runs under `torch.no_grad()`.'
        >>> probe.why("unused.weight")[0]
        "Its module wasn't called in the batch that was looked at."
    """

    def __init__(self, index: ModelIndex, names: Iterable[str], fresh: Iterable[str] = ()) -> None:
        """Begin to look.

        Args:
            index: the model.
            names: parameters that have had no gradient.
            fresh: names of those that were frozen when the fit began.
        """
        self._calls: dict[str, _Calls] = {}
        self._handles: list[RemovableHandle] = []
        self._compiled: set[str] = set()
        self._fresh = frozenset(fresh)
        self._arrived: set[str] = set()
        names = list(names)
        for name in names:
            parameter = index.parameters[name]
            if parameter.requires_grad:
                register: Any = parameter.register_post_accumulate_grad_hook
                self._handles.append(register(partial(self._arrive, name)))
        everything = index.modules[""].named_modules(remove_duplicate=False)
        compiled = [clean(path) for path, module in everything if _is_compiled(module)]
        for path in dict.fromkeys(index.owner(name) for name in names):
            around = [c for c in compiled if not c or path == c or path.startswith(c + ".")]
            if around:  # a hook would break its graph
                self._compiled.add(path)
                continue
            calls = self._calls[path] = _Calls()
            module = index.modules[index.called(path)]
            # by the class: TorchScript's modules run hooks, but have no method that takes one
            self._handles.append(nn.Module.register_forward_hook(module, _noting(calls)))

    def _arrive(self, name: str, _: Tensor) -> None:
        self._arrived.add(name)

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def why(self, name: str) -> Why:
        """The cause and the fix for one parameter."""
        path = name.rpartition(".")[0]
        if name in self._arrived:
            return (
                "The backward pass gives it a gradient, and some code sets `.grad` to None before "
                "the optimizer's step.",
                "Look for code that clears gradients between the backward pass and the step; if it "
                "is held back on purpose, raise `dead_after`, or name it in `ignore`.",
            )
        if path in self._compiled and name in self._fresh:
            return (
                "It was unfrozen after `torch.compile` had made its graph, which may still be "
                "used as it was.",
                "Call `torch._dynamo.reset()` when layers unfreeze, or compile after it.",
            )
        calls = self._calls.get(path)
        if calls is None:
            return ("The loss doesn't depend on it, or its forward runs under `no_grad`.", _USE_IT)
        if not calls.count:
            return ("Its module wasn't called in the batch that was looked at.", _USE_IT)
        if calls.with_gradient:
            return (
                "Its module is called, but the loss doesn't depend on its output: the output is "
                "unused or detached.",
                _USE_IT,
            )
        if calls.checkpointed:
            return (
                "Its forward pass is checkpointed in the reentrant way, which computes gradients "
                "only if an input requires one, and no input of it does.",
                "Use `use_reentrant=False`, or let the inputs require gradients "
                "(`model.enable_input_require_grads()`).",
            )
        return (
            "Its forward pass runs under `torch.no_grad()`.",
            "Take the `no_grad` (`inference_mode`, `detach`) away from around it, or freeze it.",
        )


def _noting(calls: _Calls) -> Any:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        calls.count += 1
        if torch.is_grad_enabled():
            calls.with_gradient += 1
        elif _in_reentrant_checkpoint():
            calls.checkpointed += 1

    return note


def _in_reentrant_checkpoint() -> bool:
    """Whether `CheckpointFunction.forward` is among the callers."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_filename.endswith("checkpoint.py"):
            return True
        frame = frame.f_back
    return False


def _is_compiled(module: nn.Module) -> bool:
    by_lightning = getattr(module, "_compiler_ctx", None) is not None
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None or by_lightning


def of_all_held(names: Iterable[str], index: ModelIndex, optimizers: Iterable[Optimizer]) -> str:
    """The class of an optimizer of which everything is among some names; or an empty text."""
    ids = {id(index.parameters[name]) for name in names}
    for optimizer in optimizers:
        held: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        if held and all(id(p) in ids for p in held):
            return type(optimizer).__name__
    return ""
