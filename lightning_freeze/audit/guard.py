"""The audit around any loop: plain torch, transformers' Trainer, a notebook."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lightning_freeze.audit.declared import Declared, ignored_by
from lightning_freeze.audit.findings import CHANGED, Finding, Seen
from lightning_freeze.audit.holdings import check_optimizers, hidden
from lightning_freeze.audit.identity import overlapping
from lightning_freeze.audit.ledger import Ledger
from lightning_freeze.audit.leftovers import left_over
from lightning_freeze.audit.scene import Scene, shared_memory
from lightning_freeze.audit.switches import by_batch
from lightning_freeze.audit.trace import START, Trace
from lightning_freeze.audit.unfrozen import left_out
from lightning_freeze.engine.flags import is_batch_norm
from lightning_freeze.engine.optimizers import ids_held, listed
from lightning_freeze.errors import ArgumentError, FrozenWeightsChanged
from lightning_freeze.model.index import ModelIndex, shape_of, some
from lightning_freeze.model.selectors import Selectors
from lightning_freeze.report.summary import groups_or_children


@contextmanager
def assert_frozen(model: nn.Module, *, ignore: Selectors = ()) -> Iterator[None]:
    """Raise when what is frozen at the start of the block isn't the same, to the bit, at its end.

    Frozen parameters and the buffers of wholly frozen modules are compared, and behind the block's
    first step those that may be weights, such as a quantised layer's. It works around any
    loop; nothing of the model is changed. While the block runs, every step of a torch optimizer is
    watched, so that the error can name the one that moved a frozen weight.

    Args:
        model: any module.
        ignore: selectors of parameters and buffers that may change although they require no
            gradient, such as a momentum encoder.

    Raises:
        FrozenWeightsChanged: names what changed, and why.
        SelectorError: a selector of `ignore` matches nothing.

    Warns:
        UserWarning: the optimizers of the block stepped another model of this kind, such as the
            one that ``transformers.Trainer(model_init=...)`` makes.

    Example:
        >>> model = nn.Linear(2, 2).requires_grad_(False)
        >>> with assert_frozen(model):
        ...     _ = model(model.weight)
        >>> with assert_frozen(model):
        ...     _ = model.bias.data.add_(1)
        Traceback (most recent call last):
        ...
        lightning_freeze.errors.FrozenWeightsChanged: [frozen-changed] bias changed although \
frozen (epoch 0, step 0, rank 0). No optimizer wrote it and its version didn't change: it was \
written through `.data` or from outside of autograd. Find code that writes `.data` of this tensor; \
if it is meant to change (a momentum encoder, a codebook), name it in `ignore`.
    """
    index = ModelIndex.of(model)
    declared = Declared.by_flags(index).without(ignored_by(index, ignore), index)
    ledger = Ledger(model, declared, index=index)
    ledger.watch_buffers((0, 0))
    trace = Trace()
    trace.begin(ledger.baseline, ledger.index.parameters, {}, START, (0, 0))
    index.forget()
    steps = 0
    optimizers: dict[int, Optimizer] = {}

    def before(optimizer: Optimizer, *_: Any) -> None:
        optimizers[id(optimizer)] = optimizer
        ledger.baseline.settle()
        trace.before_update(optimizer, (0, steps))

    def after(optimizer: Optimizer, *_: Any) -> None:
        nonlocal steps
        trace.after_update(optimizer, (0, steps))
        steps += 1
        if steps == 1 and ledger.let_move((0, 0)):
            trace.begin(ledger.baseline, index.parameters, {}, START, (0, 1), again=True)

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if not steps:  # nothing has shown what a step writes by design
        ledger.let_move((0, 0))
    _warn_of_another(ledger.index, optimizers.values())
    frozen = {n for n, first in ledger.index.canonical.items() if first in ledger.declared.frozen}
    scene = Scene(list(optimizers.values()), trace, shared=ledger.shared)
    findings = [
        seen.at(0, steps, 0)
        for seen in ledger.check(scene, flags=False)
        if seen.code in CHANGED
        or (seen.code in ("parameter-replaced", "tie-split") and frozen.intersection(seen.names))
    ]
    if findings:
        raise FrozenWeightsChanged("\n".join(map(str, findings)), findings)


def _warn_of_another(index: ModelIndex, optimizers: Iterable[Optimizer]) -> None:
    """Nothing of this model was stepped, but something of just its shapes was."""
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    if not held or any(id(p) in index.name_of for p in held):
        return
    trainable = {shape_of(p) for p in index.parameters.values() if p.requires_grad}
    if trainable and trainable <= set(map(shape_of, held)):
        warnings.warn(
            "`assert_frozen` watched a model that no optimizer of the block trains; they step "
            "another one with the same shapes. Give it the model that is trained, such as "
            "`trainer.model`.",
            stacklevel=4,
        )


def audit_parameters(model: nn.Module, optimizers: Any = ()) -> list[Finding]:
    """One look at a model and its optimizers: what is wrong already, or is going to be.

    Without a record of earlier weights it can't tell whether one changed (`assert_frozen` and
    `TrainableParamAudit` can). It tells of frozen tensors with gradients or momentum that an
    optimizer holds, of frozen batch-norms whose statistics go on moving, of frozen tensors in
    the memory of trainable ones, and of trainable tensors that no optimizer will move.

    Args:
        model: any module; it isn't changed.
        optimizers: one, several, or what `configure_optimizers` returns; without them, only the
            model is looked at.

    Returns:
        One `Finding` for each fault and layer group; an empty list if there is none.

    Raises:
        ArgumentError: `model` is no module, or there is something else among the optimizers.

    Example:
        >>> from torch.optim import SGD
        >>> model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
        >>> _ = model["backbone"].requires_grad_(False)
        >>> audit_parameters(model, SGD(model["head"].parameters(), lr=0.1))
        []
        >>> findings = audit_parameters(model, SGD(model["backbone"].parameters(), lr=0.1))
        >>> [(finding.code, finding.names) for finding in findings]
        [('not-in-optimizer', ('head.weight', 'head.bias'))]
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"`audit_parameters` got {type(model).__name__}. Give it a module, then optimizers."
        )
    found = listed(optimizers)
    index = ModelIndex.of(model)
    groups = groups_or_children(index)
    trains = [name for name, p in index.parameters.items() if p.requires_grad]
    frozen = [(n, p) for n, p in index.parameters.items() if not p.requires_grad]
    held = frozenset(
        index.name_of[id(p)]
        for optimizer in found
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) in index.name_of
    )
    ids = set[int]().union(*map(ids_held, found))
    omitted = left_out(index, groups, ids, managed=False) if found else frozenset()
    seen = check_optimizers(
        index, trains, found, (), lambda name: name not in omitted, groups=groups
    )
    seen += overlapping(shared_memory(index)[0], held if found else frozenset(trains))
    seen += _moving_statistics(index) + by_batch(index, _frozen_norms(index))
    seen += left_over(lambda: frozen, found)
    if found:
        seen += hidden(model, found)
    return [item.at(0, 0, 0) for item in seen]


def _frozen_norms(index: ModelIndex) -> list[str]:
    """Paths of batch-norms of which nothing trains."""
    return [
        path
        for path, module in index.modules.items()
        if is_batch_norm(module)
        and index.within(module)
        and not any(index.parameters[name].requires_grad for name in index.within(module))
    ]


def _moving_statistics(index: ModelIndex) -> list[Seen]:
    """Frozen batch-norms in train mode."""
    norms = {path: index.modules[path] for path in _frozen_norms(index)}
    paths = [
        path
        for path, module in norms.items()
        if module.training
        and getattr(module, "track_running_stats", True)
        and getattr(module, "running_mean", None) is not None
    ]
    if not paths:
        return []
    return [
        Seen(
            "mode-changed",
            tuple(paths),
            f"{some(paths)} is frozen but in train mode, so its running statistics go on moving",
            "`requires_grad=False` doesn't stop them; only eval mode does.",
            "Call `eval()` on it, after every `model.train()`, or freeze it with "
            "`lightning_freeze.freeze`.",
        )
    ]
