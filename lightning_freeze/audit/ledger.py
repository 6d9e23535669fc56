"""What is true of a model -> findings. It reads, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_freeze.apply import quiet_modules
from lightning_freeze.audit.causes import why_buffer_changed, why_changed
from lightning_freeze.audit.findings import Seen
from lightning_freeze.fingerprint import fingerprint
from lightning_freeze.names import ModelIndex, some
from lightning_freeze.plan import FreezePlan


@dataclass(frozen=True)
class Declared:
    """What somebody declared a model to be.

    Attributes:
        frozen: names of parameters that must not change.
        quiet: paths of modules that must be in eval mode.
        still: paths of modules whose buffers must not change.
    """

    frozen: frozenset[str]
    quiet: frozenset[str] = frozenset()
    still: frozenset[str] = frozenset()

    @classmethod
    def by_flags(cls, index: ModelIndex) -> Declared:
        """What `requires_grad` says: for a freeze that was written by hand."""
        off = frozenset(n for n, p in index.parameters.items() if not p.requires_grad)
        still = quiet_modules(index, FreezePlan(frozen=off, quiet=off))
        in_eval = [path for path in still if not index.modules[path].training]
        return cls(off, frozenset(in_eval), frozenset(still))


@dataclass
class _Baseline:
    """A frozen tensor as it was."""

    digest: str
    version: int


class Ledger:
    """What a model was declared to be and what its frozen tensors were, to compare with.

    Attributes:
        model: the model.
        index: its names when the ledger was made.
        declared: what holds now; what `requires_grad` says where nothing was declared.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> model.weight.requires_grad = False
        >>> ledger = Ledger(model)
        >>> ledger.check()
        []
        >>> _ = model.weight.data.add_(1)
        >>> [seen.code for seen in ledger.check()]
        ['frozen-changed']
    """

    def __init__(self, model: nn.Module, declared: Declared | None = None) -> None:
        self.model = model
        self.index = ModelIndex.of(model)
        self._params: dict[str, _Baseline] = {}
        self._buffers: dict[str, _Baseline] = {}
        self.declare(Declared.by_flags(self.index) if declared is None else declared)

    def declare(self, declared: Declared) -> None:
        """Take over a new declaration; what stays frozen keeps its older baseline."""
        self.declared = declared
        self._params = {
            name: self._params.get(name) or _baseline(self.index.parameters[name])
            for name in self.index.parameters
            if name in declared.frozen
        }
        self._buffers = {
            name: self._buffers.get(name) or _baseline(buffer)
            for name, buffer in _buffers(self.index, declared.still)
        }

    @property
    def tensors(self) -> int:
        """How many frozen tensors and buffers it compares."""
        return len(self._params) + len(self._buffers)

    def digests(self) -> dict[str, str]:
        """Name -> fingerprint of every frozen parameter and buffer when it was frozen."""
        found = {name: base.digest for name, base in self._params.items()}
        return found | {name: base.digest for name, base in self._buffers.items()}

    def check(
        self, optimizers: Sequence[Optimizer] = (), averaging: str = "", *, flags: bool = True
    ) -> list[Seen]:
        """Compare the model with the declaration.

        Args:
            optimizers: searched for what holds a frozen tensor.
            averaging: the name of a callback that averages weights, if there is one.
            flags: also compare flags and modes.
        """
        now = ModelIndex.of(self.model)
        seen = [*self._ties(now), *self._identity(now)]
        seen += self._changed(now, optimizers, averaging) + self._changed_buffers(now)
        if flags:
            seen += self._flags(now) + self._modes(now)
        return seen + self._stale(now, optimizers)

    def _changed(
        self, now: ModelIndex, optimizers: Sequence[Optimizer], averaging: str
    ) -> list[Seen]:
        causes: dict[tuple[str, str], list[str]] = {}
        for name, base in self._params.items():
            parameter = now.parameters.get(now.canonical.get(name, ""))
            if parameter is not None and fingerprint(parameter) != base.digest:
                why = why_changed(parameter, base.version, optimizers, averaging)
                causes.setdefault(why, []).append(name)
        return [
            Seen("frozen-changed", tuple(names), f"{some(names)} changed although frozen", *why)
            for why, names in causes.items()
        ]

    def _changed_buffers(self, now: ModelIndex) -> list[Seen]:
        current = dict(_buffers(now, self.declared.still))
        causes: dict[tuple[str, str], list[str]] = {}
        for name, base in self._buffers.items():
            buffer = current.get(name)
            if buffer is None or fingerprint(buffer) == base.digest:
                continue
            module = now.modules[now.owner(name)]
            why = why_buffer_changed(module)
            causes.setdefault(why, []).append(name)
        return [
            Seen(
                "frozen-buffer-changed",
                tuple(names),
                f"the buffers {some(names)} of frozen modules changed",
                *why,
            )
            for why, names in causes.items()
        ]

    def _flags(self, now: ModelIndex) -> list[Seen]:
        on, off, new = [], [], []
        frozen_paths = {path for path in self.declared.still if path}
        for name, parameter in now.parameters.items():
            known = name in self.index.canonical
            if not known and parameter.requires_grad:
                if any(name.startswith(path + ".") for path in frozen_paths):
                    new.append(name)
            elif known:
                declared = self.index.canonical[name] not in self.declared.frozen
                if parameter.requires_grad and not declared:
                    on.append(name)
                elif not parameter.requires_grad and declared and parameter.is_floating_point():
                    off.append(name)
        rules = (
            (on, "requires a gradient although it was declared frozen", "set it to True"),
            (off, "requires no gradient although it was declared trainable", "set it to False"),
            (
                new,
                "is a new trainable parameter in a frozen module",
                "added it after the fit began",
            ),
        )
        return [
            Seen(
                "flag-changed",
                tuple(names),
                f"{some(names)} {what}",
                f"Other code {did}.",
                "Let one place decide: name it in `trainable`, `backbone` or the schedule.",
            )
            for names, what, did in rules
            if names
        ]

    def _modes(self, now: ModelIndex) -> list[Seen]:
        awake = [p for p in self.declared.quiet if p in now.modules and now.modules[p].training]
        if not awake:
            return []
        tops = sorted(p for p in awake if p.rpartition(".")[0] not in awake or not p)
        return [
            Seen(
                "mode-changed",
                tuple(tops),
                f"{some(tops)} left eval mode although frozen",
                "Some code called `train()` on it or on a module around it.",
                "Use `FreezeBackbone` or `GradualUnfreeze`, which put it back, or call `eval()` "
                "on it in `on_train_epoch_start`.",
            )
        ]

    def _ties(self, now: ModelIndex) -> list[Seen]:
        split = []
        for first, others in self.index.aliases.items():
            group = [name for name in (first, *others) if name in now.canonical]
            if len({now.canonical[name] for name in group}) > 1:
                split.append(group)
        return [
            Seen(
                "tie-split",
                tuple(group),
                f"{' and '.join(group)} were one tensor and are several now",
                "A Parameter was assigned under one of its names.",
                "Assign it under all of them, or call the model's `tie_weights()`.",
            )
            for group in split
        ]

    def _identity(self, now: ModelIndex) -> list[Seen]:
        tied = {name for first, others in self.index.aliases.items() for name in (first, *others)}
        gone = [
            name
            for name, parameter in self.index.parameters.items()
            if name not in tied
            and now.parameters.get(now.canonical.get(name, name)) is not parameter
        ]
        if not gone:
            return []
        return [
            Seen(
                "parameter-replaced",
                tuple(gone),
                f"{some(gone)} is another Parameter object than at fit start, or gone",
                "It was assigned anew, or its module was replaced; optimizers still hold the old "
                "one.",
                "Write into it (`copy_`) instead of assigning, or do it before the fit.",
            )
        ]

    def _stale(self, now: ModelIndex, optimizers: Sequence[Optimizer]) -> list[Seen]:
        grads, states = [], []
        held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        for name in self._params:
            parameter = now.parameters.get(now.canonical.get(name, ""))
            if parameter is None:
                continue
            if parameter.grad is not None and not parameter.requires_grad:
                grads.append(name)
            if id(parameter) in held and any(o.state.get(parameter) for o in optimizers):
                states.append(name)
        seen = []
        if grads:
            seen.append(
                Seen(
                    "stale-gradient",
                    tuple(grads),
                    f"{some(grads)} is frozen but has a gradient",
                    "It was frozen after a backward pass; an optimizer that holds it steps it.",
                    "Set `.grad = None` when you freeze, as `lightning_freeze.freeze` does.",
                )
            )
        if states:
            seen.append(
                Seen(
                    "stale-optimizer-state",
                    tuple(states),
                    f"{some(states)} is frozen but an optimizer holds it with momentum",
                    "It trained before it was frozen, and stayed in its parameter group.",
                    "Remove it from the group and from `optimizer.state`, as `FreezeBackbone` "
                    "does.",
                )
            )
        return seen


def _baseline(tensor: Tensor) -> _Baseline:
    return _Baseline(fingerprint(tensor), tensor._version)


def _buffers(index: ModelIndex, paths: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Buffers that are part of the weights; derived ones (non-persistent) may be recomputed."""
    for path in paths:
        module = index.modules.get(path)
        if module is None:
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer
