"""The only writer of `requires_grad`, `.grad` and train/eval mode, and what goes with the mode."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from lightning_freeze.errors import ConflictError
from lightning_freeze.model.index import ModelIndex, class_names
from lightning_freeze.model.selectors import Selectors, select
from lightning_freeze.schedule.plan import FreezePlan

# torch's operations that have a mode, and the place of their argument for it
_TRAINING = {"aten::batch_norm": 5, "aten::dropout": 2}

# what torch goes by in the forward pass of an encoder, set from `enable_nested_tensor`
_NESTED = "use_nested_tensor"

# Notes in a module's `__dict__`, which go along when a model is copied or pickled: the keys of its
# own parameters that a plan switched off, so that a later fit can tell them from what the user
# froze; and the attributes that it had before `freeze`.
_FROZEN_BY_PLAN = "_frozen_by_lightning_freeze"
_BEFORE = "_before_lightning_freeze"
NOTES = frozenset({_FROZEN_BY_PLAN, _BEFORE})


def can_train(parameter: nn.Parameter) -> bool:
    """Whether torch lets this tensor require a gradient: quantised integers can't."""
    return parameter.is_floating_point() or parameter.is_complex()


def freeze(model: nn.Module, selectors: Selectors, *, eval_mode: bool = True) -> tuple[str, ...]:
    """Freeze what `selectors` match: no gradient, and eval mode where a module is wholly frozen.

    Args:
        model: any module; it is changed in place.
        selectors: paths, globs, `re:` expressions or callables; see `lightning_freeze.selectors`.
        eval_mode: also put modules of which nothing trains any more into eval mode, without which
            dropout stays on and batch-norm statistics go on moving. ``model.train()`` undoes
            that: call `freeze` after it.

    Returns:
        The names of the parameters that are frozen now by this call.

    Raises:
        SelectorError: a selector matches nothing; the model is left as it was.
        ConflictError: a module was traced in train mode, so that eval mode doesn't reach it.

    Example:
        >>> model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
        >>> freeze(model, "backbone")
        ('backbone.weight', 'backbone.bias')
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['head.weight', 'head.bias']
    """
    index = ModelIndex.of(model)
    names = select(index, selectors)
    chosen = frozenset(names)
    off = chosen.union(n for n, p in index.parameters.items() if not p.requires_grad)
    inside = {
        path: index.within(index.modules[path])
        for path in quiet_modules(index, FreezePlan(frozen=off, quiet=off))
    }
    paths = [path for path, own in inside.items() if not own or chosen.intersection(own)]
    if eval_mode:
        check_traced(index, paths)
    _set_flags(index, names, trains=False, by_plan=False)
    if eval_mode:
        for module in map(index.modules.__getitem__, paths):
            # the attribute, not .eval(): that recurses, and users override it
            name, value = ("dropout", 0.0) if _needs_train_mode(module) else ("training", False)
            _set_by_hand(module, name, value)
        for encoder in _mixed_encoders(index, inside):
            _set_by_hand(encoder, _NESTED, False)
    return names


def unfreeze(model: nn.Module, selectors: Selectors) -> tuple[str, ...]:
    """Let what `selectors` match train again, and give back the modes that `freeze` changed.

    A parameter that was frozen when the optimizer was made may be missing from it: see
    `summarize(model, optimizer)`.

    Args:
        model: any module; it is changed in place.
        selectors: paths, globs, `re:` expressions or callables; `"**"` for everything.

    Returns:
        The names of the parameters that train now by this call. Integer tensors can't.

    Raises:
        SelectorError: a selector matches nothing; the model is left as it was.

    Example:
        >>> model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
        >>> _ = freeze(model, "**")
        >>> unfreeze(model, "head")
        ('head.weight', 'head.bias')
    """
    index = ModelIndex.of(model)
    names = tuple(n for n in select(index, selectors) if can_train(index.parameters[n]))
    _set_flags(index, names, trains=True, by_plan=False)
    off = frozenset(n for n, p in index.parameters.items() if not p.requires_grad)
    quiet = quiet_modules(index, FreezePlan(off, off))
    still = {id(index.modules[path]) for path in quiet}
    still |= {id(encoder) for encoder in _mixed_encoders(index, quiet)}
    for module in index.modules.values():
        if _BEFORE in vars(module) and id(module) not in still:
            for name, value in vars(module).pop(_BEFORE).items():
                setattr(module, name, value)
    return names


def _set_by_hand(module: nn.Module, name: str, value: Any) -> None:
    if getattr(module, name) != value:
        vars(module).setdefault(_BEFORE, {})[name] = getattr(module, name)
        setattr(module, name, value)


def _needs_train_mode(module: nn.Module) -> bool:
    """Whether a frozen module stays in train mode, with a dropout of 0 that makes it the same.

    cuDNN can't go back through an RNN in eval mode, to what trains below it.
    """
    return isinstance(module, nn.RNNBase)


def _mixed_encoders(index: ModelIndex, quiet: Iterable[str]) -> Iterator[nn.TransformerEncoder]:
    """Encoders whose first layer is in eval mode, and another isn't.

    The first one decides that they compute on nested tensors, which train mode can't.

    Args:
        index: the model.
        quiet: paths of the modules in eval mode.
    """
    still = {id(index.modules[path]) for path in quiet}
    for module in index.modules.values():
        # one that was pickled by an older torch has no such attribute, and no such path
        if isinstance(module, nn.TransformerEncoder) and hasattr(module, _NESTED):
            modes = [id(layer) in still for layer in module.layers]
            if any(modes[:1]) and not all(modes):
                yield module


def frozen_by_user(index: ModelIndex) -> frozenset[str]:
    """Names that are frozen, but not because an earlier plan of ours froze them."""
    return frozenset(
        name
        for name, parameter in index.parameters.items()
        if not parameter.requires_grad and not _is_by_plan(index, name)
    )


def _is_by_plan(index: ModelIndex, name: str) -> bool:
    owner, _, key = name.rpartition(".")
    return key in vars(index.modules[owner]).get(_FROZEN_BY_PLAN, ())


def _note(index: ModelIndex, name: str, *, by_plan: bool) -> None:
    owner, _, key = name.rpartition(".")
    notes = vars(index.modules[owner])
    if by_plan:
        notes.setdefault(_FROZEN_BY_PLAN, set()).add(key)
    elif key in notes.get(_FROZEN_BY_PLAN, ()):
        notes[_FROZEN_BY_PLAN].remove(key)


def release(index: ModelIndex, claimed: Iterable[str] = ()) -> None:
    """Before a fit: undo what an earlier plan froze, and let what a selector claims train.

    Then a `configure_optimizers` that filters on `requires_grad` sees all that will ever train.
    """
    names = [name for name in index.parameters if _is_by_plan(index, name)]
    names += [name for name in claimed if can_train(index.parameters[name])]
    _set_flags(index, names, trains=True, by_plan=True)


def _set_flags(index: ModelIndex, names: Iterable[str], *, trains: bool, by_plan: bool) -> None:
    for name in names:
        parameter = index.parameters[name]
        if not trains:
            if by_plan and parameter.requires_grad:
                _note(index, name, by_plan=True)
            parameter.grad = None
        if trains or not by_plan:
            _note(index, name, by_plan=False)
        if parameter.requires_grad != trains:
            parameter.requires_grad = trains


def graph_of(module: torch.jit.ScriptModule) -> Any:
    """What a TorchScript module itself does; None for a list, which isn't called."""
    try:
        return module.graph
    except RuntimeError:
        return None


def check_traced(index: ModelIndex, paths: Iterable[str]) -> None:
    """Raise where `torch.jit.trace` has written train mode into a graph: it heeds no flag.

    Raises:
        ConflictError: names the module.
    """
    for path in paths:
        module = index.modules[path]
        if not isinstance(module, torch.jit.ScriptModule):
            continue
        graph = graph_of(module)
        for kind, place in _TRAINING.items():
            for node in graph.findAllNodes(kind) if graph is not None else ():
                inputs = [value.toIValue() for value in node.inputs()]
                if inputs[place] is True and inputs[1] != 0.0:  # a dropout of 0 does nothing
                    raise ConflictError(
                        f"`{path}` should be in eval mode while it is frozen, but was traced in "
                        "train mode, and keeps that in its graph. Trace it in eval mode, "
                        "`torch.jit.trace(module.eval(), ...)`, or use `torch.jit.script`; "
                        "`eval_mode=False` freezes its weights alone."
                    )


def is_batch_norm(module: nn.Module) -> bool:
    """True for BatchNorm and SyncBatchNorm of any dimension, and subclasses."""
    names = class_names(module)
    # TorchScript's modules have no bases, only the name of the class that they were
    return "_BatchNorm" in names or (len(names) == 1 and "BatchNorm" in names[0])


def quiet_modules(index: ModelIndex, plan: FreezePlan) -> list[str]:
    """Paths of the modules that belong in eval mode under a plan.

    A module does if all parameters under it are frozen, those of lively batch-norms aside, and so
    does everything below such a module; a lively batch-norm only if it is frozen itself.
    """
    lively = {
        name
        for path in plan.lively
        if path in index.modules
        for name in index.within(index.modules[path])
    } - plan.frozen  # what of them is frozen counts
    quiet: dict[str, None] = {}
    apart = index.held(lively) if lively else repeat(("", 0, 0))
    for (path, inside, hushed), (_, _, own) in zip(index.held(plan.quiet - lively), apart):
        if path in plan.lively:
            frozen = bool(inside) and plan.quiet.issuperset(index.within(index.modules[path]))
        elif inside > own:
            frozen = hushed == inside - own
        else:
            frozen = _parent_in(path, quiet)
        if frozen:
            quiet[path] = None
    return list(quiet)


def _parent_in(path: str, quiet: Container[str]) -> bool:
    return bool(path) and path.rpartition(".")[0] in quiet


@dataclass(frozen=True)
class Snapshot:
    """Flags and modes of a model, and who set them, to go back to when a fit is refused."""

    flags: Mapping[str, bool]
    modes: Mapping[str, bool]
    by_plan: frozenset[str]

    @classmethod
    def of(cls, index: ModelIndex) -> Snapshot:
        """Remember the flags and modes of a model."""
        return cls(
            {name: p.requires_grad for name, p in index.parameters.items()},
            {path: module.training for path, module in index.modules.items()},
            frozenset(name for name in index.parameters if _is_by_plan(index, name)),
        )

    def restore(self, index: ModelIndex) -> None:
        """Put them back."""
        for name, flag in self.flags.items():
            if name not in index.parameters:
                continue
            parameter = index.parameters[name]
            if parameter.requires_grad != flag:
                parameter.requires_grad = flag
            _note(index, name, by_plan=name in self.by_plan)
        for path, mode in self.modes.items():
            if path in index.modules:
                index.modules[path].training = mode


class _Guard:
    """Has modes reasserted where a frozen module is entered; in copies of the model, nothing."""

    def __init__(self, applier: Applier | None = None) -> None:
        self._applier = applier

    def __call__(self, module: nn.Module, args: Any) -> None:
        """A frozen module is entered."""
        applier = self._applier
        if applier is not None and (module.training or applier.recomputes):
            applier.reassert()

    def __reduce__(self) -> Any:
        return _Guard, ()


class _Statistics:
    """What a frozen batch-norm has seen, put back where those of all batch-norms are recomputed.

    `StochasticWeightAveraging` and torch's `update_bn` reset them and set the momentum to None;
    where it was None before, they are found with no batch counted. Any other write is left as it
    is, for an audit to find.
    """

    def __init__(self, module: Any) -> None:
        self._module, self._momentum = module, module.momentum
        self._take()

    def _take(self) -> None:
        self._kept = {
            name: (buffer, buffer._version, buffer.clone())
            for name, buffer in self._module._buffers.items()
            if buffer is not None and not is_lazy(buffer)
        }

    @property
    def recomputed(self) -> bool:
        """Whether somebody is about to recompute them."""
        if self._module.momentum is not None or self._momentum is not None:
            return self._module.momentum is None
        now = self._module.num_batches_tracked
        if now is None or is_lazy(now):
            return False
        count, version, value = self._kept["num_batches_tracked"]
        return (now is not count or now._version != version) and int(now) == 0 < int(value)

    @torch.no_grad()
    def look(self) -> None:
        """Put them back if they are being recomputed; else take down what they are."""
        buffers = self._module._buffers
        if self.recomputed:
            self._module.momentum = self._momentum
            for name, (buffer, version, value) in self._kept.items():
                buffers[name] = buffer
                if buffer._version != version:
                    buffer.copy_(value)
        elif all(buffers.get(n) is b and b._version == v for n, (b, v, _) in self._kept.items()):
            return
        self._take()

    @torch.no_grad()
    def end(self) -> None:
        """Put back what was written past autograd and differs by rounding alone.

        An average of equal values is rounded; one of what trained before it froze is meant.
        """
        pairs = [
            (buffer, value)
            for name, (buffer, version, value) in self._kept.items()
            if self._module._buffers.get(name) is buffer and buffer._version == version
        ]
        real = [(buffer, value) for buffer, value in pairs if value.is_floating_point()]
        if all(torch.allclose(buffer, value, rtol=1e-2, equal_nan=True) for buffer, value in real):
            for buffer, value in pairs:
                buffer.copy_(value)


class Applier:
    """Applies plans to one model during one fit, and keeps frozen modules in eval mode.

    Attributes:
        index: the model.
        woken: paths of the modules that were left in eval although they train, and that were put
            in train mode.
    """

    def __init__(self, index: ModelIndex, trained: Iterable[str]) -> None:
        """Start on a model.

        Args:
            index: the model.
            trained: names that will train at some time in this fit and that an optimizer holds;
                what of them `from_pretrained` left in eval mode is put in train mode.
        """
        self.index = index
        self._before = {id(m): m.training for m in index.modules.values()}
        self.woken = self._wake(frozenset(trained))
        self._original = {id(m): m.training for m in index.modules.values()}
        self._quiet: list[nn.Module] = []
        self._marked: frozenset[str] | None = None  # what may be noted as frozen by a plan
        self._guards: list[RemovableHandle] = []
        self._statistics: list[_Statistics] = []
        self._overridden: list[tuple[nn.Module, str, Any]] = []

    def _wake(self, trained: frozenset[str]) -> tuple[str, ...]:
        """Undo the eval mode in which `from_pretrained` leaves a model.

        Only whole containers: a single batch-norm or dropout in eval was somebody's decision.
        """
        modules = self.index.modules
        asleep = {path for path, module in modules.items() if not module.training}
        woken: set[str] = set()
        for path in asleep:
            top = path
            while top and top.rpartition(".")[0] in asleep:
                top = top.rpartition(".")[0]
            if not any(True for _ in modules[top].children()):
                continue
            holder = path
            while holder and not self.index.holds(modules[holder]):
                holder = holder.rpartition(".")[0]
            if not trained.isdisjoint(self.index.within(modules[holder])):
                woken.add(path)
        for path in woken:
            modules[path].training = True
        return tuple(path for path in modules if path in woken)

    def apply(self, plan: FreezePlan) -> bool:
        """Make the model what the plan says; doing it twice changes nothing.

        Returns:
            Whether any flag changed.
        """
        frozen, marked = plan.frozen, self._marked
        off: list[str] = []
        on: list[str] = []
        changed = False
        for name, parameter in self.index.parameters.items():
            trains = parameter.requires_grad
            if name in frozen:
                changed |= trains
                if trains or parameter.grad is not None:
                    off.append(name)
            elif (not trains or marked is None or name in marked) and can_train(parameter):
                changed |= not trains
                on.append(name)
        _set_flags(self.index, off, trains=False, by_plan=True)
        _set_flags(self.index, on, trains=True, by_plan=True)
        self._marked = frozen
        paths = quiet_modules(self.index, plan)
        check_traced(self.index, paths)
        quiet = [self.index.modules[path] for path in paths]
        self._override([])
        wanted: list[tuple[Any, str, Any]] = [
            (encoder, _NESTED, False) for encoder in _mixed_encoders(self.index, paths)
        ]
        for module in filter(_needs_train_mode, quiet):
            wanted += [(module, "training", True), (module, "dropout", 0.0)]
        self._override(wanted)
        quiet = [module for module in quiet if not _needs_train_mode(module)]
        kept = {id(module) for module in quiet}
        for module in self._quiet:
            if id(module) not in kept:
                module.training = self._original[id(module)]
        self._quiet = quiet
        self._statistics = [
            _Statistics(m) for m in quiet if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        self.reassert()
        known = set(paths)
        self._guard([path for path in paths if not _parent_in(path, known)])
        return changed

    def _override(self, wanted: list[tuple[Any, str, Any]]) -> None:
        """Set attributes for as long as they are wanted; those that aren't any more come back."""
        for module, name, value in self._overridden:
            setattr(module, name, value)
        self._overridden = [(module, name, getattr(module, name)) for module, name, _ in wanted]
        for module, name, value in wanted:
            setattr(module, name, value)

    @property
    def recomputes(self) -> bool:
        """Whether somebody is about to recompute the statistics of all batch-norms."""
        return any(statistics.recomputed for statistics in self._statistics)

    def reassert(self) -> None:
        """Put frozen modules back in eval mode if somebody called ``train()``."""
        for module in self._quiet:
            if module.training:
                module.training = False
        for statistics in self._statistics:
            statistics.look()

    @property
    def quiet(self) -> list[nn.Module]:
        """The modules that are kept in eval mode at present."""
        return self._quiet

    def _guard(self, roots: list[str]) -> None:
        """Reassert when a frozen module is entered: ``train()`` may be called inside a step."""
        self._take_guards_off()
        guard = _Guard(self)
        called = dict.fromkeys(map(self.index.called, roots))
        # by the class: TorchScript's modules run hooks, but have no method that takes one
        add = nn.Module.register_forward_pre_hook
        self._guards = [add(self.index.modules[path], guard) for path in called]

    def _take_guards_off(self) -> None:
        for handle in self._guards:
            handle.remove()
        self._guards = []

    def stop(self) -> None:
        """At the end of the fit: no guards, and frozen modules in the modes that they had."""
        self._take_guards_off()
        for module in self._quiet:
            module.training = self._before[id(module)]
        self._override([])
        for statistics in self._statistics:
            statistics.end()
        self._quiet, self._statistics = [], []
        for module in self.index.modules.values():
            if vars(module).get(_FROZEN_BY_PLAN) == set():
                del vars(module)[_FROZEN_BY_PLAN]
