"""What is true of a model -> findings. It reads, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_freeze.apply import is_batch_norm, quiet_modules
from lightning_freeze.errors import AuditError, FrozenWeightsChanged
from lightning_freeze.fingerprint import fingerprint
from lightning_freeze.names import ModelIndex
from lightning_freeze.plan import FreezePlan

CODES = (
    "frozen-changed",
    "frozen-buffer-changed",
    "flag-changed",
    "mode-changed",
    "not-in-optimizer",
    "no-gradient",
    "not-updated",
    "stale-gradient",
    "stale-optimizer-state",
    "rank-mismatch",
    "tie-split",
    "parameter-replaced",
    "scheduler-mismatch",
    "resume-mismatch",
    "nothing-trainable",
)
_CHANGED = ("frozen-changed", "frozen-buffer-changed")


@dataclass(frozen=True)
class Finding:
    """One thing that the audit saw.

    Attributes:
        code: one of `CODES`.
        names: dotted names of the tensors or modules, or of optimizers and schedulers.
        epoch: counted from 0.
        step: optimizer steps so far.
        rank: the process that saw it.
        message: what is the matter, in one sentence.
        cause: what the audit found to be the reason, or that it found none.
        fix: what to do about it.
    """

    code: str
    names: tuple[str, ...]
    epoch: int
    step: int
    rank: int
    message: str
    cause: str = ""
    fix: str = ""

    def __str__(self) -> str:
        where = f"epoch {self.epoch}, step {self.step}, rank {self.rank}"
        tail = "".join(f" {text}" for text in (self.cause, self.fix) if text)
        return f"[{self.code}] {self.message} ({where}).{tail}"

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "names": list(self.names)}


@dataclass(frozen=True)
class Seen:
    """A finding before it is known when and where: code, names, message, cause, fix."""

    code: str
    names: tuple[str, ...]
    message: str
    cause: str = ""
    fix: str = ""

    def at(self, epoch: int, step: int, rank: int) -> Finding:
        """Stamp it."""
        return Finding(self.code, self.names, epoch, step, rank, self.message, self.cause, self.fix)


def error_for(findings: Sequence[Finding]) -> AuditError:
    """The exception that says what some findings say."""
    changed = any(finding.code in _CHANGED for finding in findings)
    kind = FrozenWeightsChanged if changed else AuditError
    return kind("\n".join(str(finding) for finding in findings), findings)


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


@dataclass
class Ledger:
    """What a model was declared to be and what its frozen tensors were, to compare with.

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

    model: nn.Module
    declared: Declared = field(default_factory=lambda: Declared(frozenset()))
    index: ModelIndex = field(init=False)
    _params: dict[str, _Baseline] = field(init=False, default_factory=dict)
    _buffers: dict[str, _Baseline] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.index = ModelIndex.of(self.model)
        if not self.declared.frozen and not self.declared.still:
            self.declared = Declared.by_flags(self.index)
        self.declare(self.declared)

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
                causes.setdefault(_why(parameter, base, optimizers, averaging), []).append(name)
        return [
            Seen("frozen-changed", tuple(names), f"{_list(names)} changed although frozen", *why)
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
            why = ("Some code wrote to it.", "Find what writes to this buffer and stop it.")
            if is_batch_norm(module) and module.training:
                why = (
                    "Its batch-norm is in train mode, and `requires_grad=False` doesn't stop "
                    "running statistics.",
                    "Put it in eval mode on every epoch, as `FreezeBackbone` does, or say "
                    "`train_bn=True`.",
                )
            causes.setdefault(why, []).append(name)
        return [
            Seen(
                "frozen-buffer-changed",
                tuple(names),
                f"the buffers {_list(names)} of frozen modules changed",
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
                f"{_list(names)} {what}",
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
                f"{_list(tops)} left eval mode although frozen",
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
                f"{_list(gone)} is another Parameter object than at fit start, or gone",
                "It was assigned anew, or its module was replaced; optimizers still hold the old "
                "one.",
                "Write into it (`copy_`) instead of assigning, or do it before the fit.",
            )
        ]

    def _stale(self, now: ModelIndex, optimizers: Sequence[Optimizer]) -> list[Seen]:
        grads, states = [], []
        for name in self._params:
            parameter = now.parameters.get(now.canonical.get(name, ""))
            if parameter is None:
                continue
            holder = _holder(parameter, optimizers)
            if parameter.grad is not None and not parameter.requires_grad:
                grads.append(name)
            if holder and any(parameter in o.state and o.state[parameter] for o in optimizers):
                states.append(name)
        seen = []
        if grads:
            seen.append(
                Seen(
                    "stale-gradient",
                    tuple(grads),
                    f"{_list(grads)} is frozen but has a gradient",
                    "It was frozen after a backward pass; an optimizer that holds it steps it.",
                    "Set `.grad = None` when you freeze, as `lightning_freeze.freeze` does.",
                )
            )
        if states:
            seen.append(
                Seen(
                    "stale-optimizer-state",
                    tuple(states),
                    f"{_list(states)} is frozen but an optimizer holds it with momentum",
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


def _holder(parameter: Tensor, optimizers: Iterable[Optimizer]) -> str:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(p is parameter for p in group["params"]):
                return type(optimizer).__name__
    return ""


def _why(
    parameter: nn.Parameter, base: _Baseline, optimizers: Sequence[Optimizer], averaging: str
) -> tuple[str, str]:
    """The cause and the fix for a frozen parameter that changed, by looking at it."""
    holder = _holder(parameter, optimizers)
    if parameter.requires_grad:
        stepped = f", and {holder} holds it" if holder else ""
        return (
            f"`requires_grad` is True: other code turned it on{stepped}.",
            "Find what sets `requires_grad` and leave that to one callback.",
        )
    if holder and parameter.grad is not None:
        return (
            f"{holder} holds it and it has a stale gradient, which each step applies.",
            "Set `.grad = None` when you freeze, as `lightning_freeze.freeze` does.",
        )
    if holder:
        return (
            f"{holder} holds it: weight decay and momentum move what has no gradient, too.",
            "Leave frozen parameters out of the optimizer, as `FreezeBackbone` does.",
        )
    if averaging:
        return (
            f"`{averaging}` averages weights and writes the average back, rounded.",
            "Leave the frozen parameters out of the average, or accept changes in the last bit.",
        )
    if parameter._version == base.version:
        return (
            "No optimizer holds it and its version didn't change: it was written through `.data` "
            "or from outside of autograd.",
            "Find code that writes `.data` of this tensor.",
        )
    return (
        "No optimizer holds it: it was written in place by other code.",
        "Find an in-place write (`copy_`, `mul_`, `load_state_dict`) to this tensor.",
    )


def check_optimizers(
    index: ModelIndex,
    trainable: Iterable[str],
    optimizers: Sequence[Optimizer],
    schedulers: Iterable[Any],
    expected: Callable[[str], bool] = lambda name: True,
) -> list[Seen]:
    """What trains but can't: nothing trainable, in no optimizer; scheduler lists that don't fit.

    Args:
        index: the model.
        trainable: names that are declared to train now.
        optimizers: of the trainer.
        schedulers: of the trainer.
        expected: whether a name's absence from the optimizers is a fault; parameters may be left
            out on purpose.
    """
    seen: list[Seen] = []
    names = list(trainable)
    if not names:
        seen.append(
            Seen(
                "nothing-trainable",
                (),
                "nothing in the model trains",
                "Every parameter is frozen.",
                "Leave at least the head trainable.",
            )
        )
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    missing = [n for n in names if id(index.parameters[n]) not in held and expected(n)]
    if missing and optimizers:
        seen.append(
            Seen(
                "not-in-optimizer",
                tuple(missing),
                f"{_list(missing)} should train but is in no optimizer",
                "`configure_optimizers` leaves it out.",
                "Give the optimizer all parameters that will ever train.",
            )
        )
    for scheduler in schedulers:
        optimizer = getattr(scheduler, "optimizer", None)
        lists = getattr(scheduler, "base_lrs", None) or getattr(scheduler, "min_lrs", None)
        size = len(lists or ())
        if optimizer is not None and size and size != len(optimizer.param_groups):
            kind = type(scheduler).__name__
            seen.append(
                Seen(
                    "scheduler-mismatch",
                    (kind,),
                    f"{kind} knows {size} parameter groups, its optimizer has "
                    f"{len(optimizer.param_groups)}",
                    "A group was added or removed after the scheduler was made.",
                    "Don't call `add_param_group` during a fit.",
                )
            )
    return seen


def check_ranks(digests: Sequence[Mapping[str, str]]) -> list[Seen]:
    """Compare fingerprints of the same names across ranks, given in the order of ranks."""
    different = [
        name
        for name in digests[0]
        if any(other.get(name) != digests[0][name] for other in digests[1:])
    ]
    if not different:
        return []
    ranks = [
        str(rank)
        for rank, other in enumerate(digests)
        if any(other.get(name) != digests[0][name] for name in different)
    ]
    return [
        Seen(
            "rank-mismatch",
            tuple(different),
            f"{_list(different)} differ between rank 0 and rank {', '.join(ranks)}",
            "The replicas have drifted apart: a gradient wasn't averaged, or one rank wrote alone.",
            "Change the trainable set through these callbacks alone; they re-wrap the model.",
        )
    ]


@dataclass
class GradientWatch:
    """Which parameters that train have had a gradient, and how long the others have waited.

    It costs nothing once each has had one.

    Attributes:
        dead_after: optimizer steps without a gradient after which one counts as dead.
    """

    dead_after: int
    _waiting: dict[str, list[Any]] = field(default_factory=dict)
    _alive: set[str] = field(default_factory=set)

    def arm(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Watch these from now on; what had a gradient before isn't waited for again."""
        self._alive.intersection_update(parameters)
        self._waiting = {
            name: self._waiting.get(name) or [parameter, 0]
            for name, parameter in parameters.items()
            if name not in self._alive
        }

    def before_step(self, optimizer: Optimizer) -> list[str]:
        """Look at the gradients before a step; returns who has just been found dead."""
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

    @property
    def alive(self) -> frozenset[str]:
        """Names that have had a gradient since they began to train."""
        return frozenset(self._alive)


@contextmanager
def assert_frozen(model: nn.Module) -> Iterator[None]:
    """Raise when what is frozen at the start of the block isn't the same, to the bit, at its end.

    Frozen parameters and the buffers of wholly frozen modules are compared. It works around any
    loop; nothing of the model is changed.

    Args:
        model: any module.

    Raises:
        FrozenWeightsChanged: names what changed, and why.

    Example:
        >>> model = nn.Linear(2, 2).requires_grad_(False)
        >>> with assert_frozen(model):
        ...     _ = model(model.weight)
        >>> with assert_frozen(model):
        ...     _ = model.bias.data.add_(1)
        Traceback (most recent call last):
        ...
        lightning_freeze.errors.FrozenWeightsChanged: [frozen-changed] bias changed although \
frozen (epoch 0, step 0, rank 0). No optimizer holds it and its version didn't change: it was \
written through `.data` or from outside of autograd. Find code that writes `.data` of this tensor.
    """
    ledger = Ledger(model)
    yield
    findings = [
        seen.at(0, 0, 0)
        for seen in ledger.check(flags=False)
        if seen.code in (*_CHANGED, "parameter-replaced", "tie-split")
    ]
    if findings:
        raise FrozenWeightsChanged("\n".join(map(str, findings)), findings)


def _list(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
