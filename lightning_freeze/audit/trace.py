"""Who wrote to a frozen tensor, and when: noted while it happens.

At an epoch's end a changed tensor doesn't tell who changed it. So versions and flags of frozen
tensors, and gradients of those that an optimizer holds, are looked at between the parts of a step.
That takes well under a microsecond a tensor; bytes are read only where something is odd.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_freeze.audit.baseline import Baseline, Moment, versions
from lightning_freeze.audit.numbers import all_zero

# where a look is taken; a write is known to have been between two of them
START = "a batch's start"
UPDATE = "the optimizer's update"
UPDATED = "the end of the optimizer's update"
END = "a batch's end"
VALIDATION = "a validation's start"
VALIDATED = "a validation's end"
SAVED = "a checkpoint"
EPOCH = "an epoch's start"
EPOCH_END = "an epoch's end"
BEGIN = "the fit's setup"
FIT = "the fit's start"
FIT_END = "the fit's end"


def of_torch(optimizer: Optimizer) -> bool:
    """Whether it is one of torch's own, which leave a tensor without a gradient alone."""
    return type(optimizer).__module__.startswith("torch.optim")


@dataclass(frozen=True)
class Update:
    """A frozen tensor was written while an optimizer stepped.

    Attributes:
        optimizer: its class.
        gradient: what the tensor had then: "none", "zero", or "some".
        flag: whether it required a gradient then.
        at: epoch and optimizer step before it.
    """

    optimizer: str
    gradient: str
    flag: bool
    at: Moment


@dataclass(frozen=True)
class Write:
    """A frozen tensor was written at some other time.

    Attributes:
        after: the last look at which it was as before.
        before: the look at which it wasn't.
        silent: whether its version didn't tell, so that it went past autograd.
        at: epoch and optimizer step of the earlier look.
    """

    after: str
    before: str
    silent: bool
    at: Moment


@dataclass(frozen=True)
class Flip:
    """A flag or a mode changed between two looks.

    Attributes:
        after: the last look at which it was as before.
        before: the look at which it wasn't.
        at: epoch and optimizer step of the earlier look.
        early: whether that was before the fit's first batch.
    """

    after: str
    before: str
    at: Moment
    early: bool = False


class Trace:
    """Notes on one baseline.

    Attributes:
        updates: name -> the first update that wrote it.
        writes: name -> the first other write.
        flips: name of a parameter -> when its flag changed.
        modes: path of a module -> when its mode changed.
        stepped: classes of the optimizers that have stepped.
    """

    def __init__(self) -> None:
        self.updates: dict[str, Update] = {}
        self.writes: dict[str, Write] = {}
        self.flips: dict[str, Flip] = {}
        self.modes: dict[str, Flip] = {}
        self.stepped: set[str] = set()
        self._baseline = Baseline()
        self._frozen: list[Tensor] = []
        self._buffers: list[int] = []
        self._versions: list[int] = []
        self._flags = b""
        self._modes = b""
        self._parameters: Mapping[str, nn.Parameter] = {}
        self._quiet: Mapping[str, nn.Module] = {}
        self._last = (FIT, (0, 0))
        self._last_flags = (FIT, (0, 0))
        self._early = True
        self._held: dict[int, tuple[tuple[int, ...], list[int]]] = {}
        self._odd: dict[int, tuple[str, bytes]] = {}
        self._steps: dict[int, int] = {}

    def begin(
        self,
        baseline: Baseline,
        parameters: Mapping[str, nn.Parameter],
        quiet: Mapping[str, nn.Module],
        label: str,
        now: Moment,
        flags: bytes | None = None,
        *,
        again: bool = False,
    ) -> None:
        """Start to watch what is frozen from now on.

        Args:
            baseline: the frozen tensors, parameters first.
            parameters: all parameters, whose flags are watched.
            quiet: the modules whose modes are.
            label: where we are.
            now: epoch and optimizer step.
            flags: what each parameter's flag should be; what it is now where None.
            again: whether the same is declared as before, so that its notes on flags still hold.
        """
        names = set(baseline.names)
        self.updates = {name: note for name, note in self.updates.items() if name in names}
        self.writes = {name: note for name, note in self.writes.items() if name in names}
        self.stepped.clear()
        if not again:
            self.flips.clear()
            self.modes.clear()
        self._held.clear()
        self._odd.clear()
        self._steps.clear()
        self._baseline = baseline
        self._parameters = parameters
        self._quiet = quiet
        present = [baseline.tensor(position) for position in range(len(baseline))]
        self._frozen = [torch.empty(0) if tensor is None else tensor for tensor in present]
        self._buffers = [p for p in range(len(self._frozen)) if baseline.is_buffer(p)]
        self._versions = versions(self._frozen)
        is_on = bytes([parameter.requires_grad for parameter in parameters.values()])
        self._flags = is_on if flags is None else flags
        self._modes = bytes([module.training for module in quiet.values()])
        self._last = self._last_flags = (label, now)

    def forget(self, names: Iterable[str]) -> None:
        """What was noted of these has been told: a later write is another one."""
        gone = set(names)
        for name in gone:
            self.updates.pop(name, None)
            self.writes.pop(name, None)
        for position, name in enumerate(self._baseline.names):
            if name in gone:
                self._versions[position] = versions((self._frozen[position],))[0]

    def since(self, names: Iterable[str]) -> Moment | None:
        """The last moment at which all of these were right, if they were seen to be written."""
        notes = [self.updates.get(name) or self.writes.get(name) for name in names]
        known = [note.at for note in notes if note is not None]
        return min(known) if known and len(known) == len(notes) else None

    def look(self, label: str, now: Moment) -> None:
        """See which frozen tensors were written since the last look."""
        fresh = versions(self._frozen)
        if fresh != self._versions:
            for position, (old, new) in enumerate(zip(self._versions, fresh)):
                if old != new:
                    self._note(position, label, silent=False)
            self._versions = fresh
        for position in self._buffers:
            tensor = self._baseline.tensor(position)
            if tensor is not None and tensor is not self._frozen[position]:  # assigned anew
                self._frozen[position] = tensor
                self._note(position, label, silent=False)
        self._last = (label, now)

    def _note(self, position: int, label: str, *, silent: bool) -> None:
        after, at = self._last
        name = self._baseline.names[position]
        self.writes.setdefault(name, Write(after, label, silent, at))

    def look_at_flags(self, label: str, now: Moment) -> None:
        """See which flags and modes changed since the last look at them."""
        after, at = self._last_flags
        flags = bytes([parameter.requires_grad for parameter in self._parameters.values()])
        if flags != self._flags:
            for name, old, new in zip(self._parameters, self._flags, flags):
                if old != new:
                    self.flips.setdefault(name, Flip(after, label, at, self._early))
            self._flags = flags
        modes = bytes([module.training for module in self._quiet.values()])
        if modes != self._modes:
            for path, old, new in zip(self._quiet, self._modes, modes):
                if old != new:
                    self.modes.setdefault(path, Flip(after, label, at, self._early))
            self._modes = modes
        self._last_flags = (label, now)
        self._early = self._early and label != START

    def before_update(self, optimizer: Optimizer, now: Moment) -> None:
        """Just before an optimizer changes what it holds."""
        self.look(UPDATE, now)
        self._odd.clear()
        strange = not of_torch(optimizer) and self._due(optimizer)
        for position in self._held_by(optimizer):
            gradient = self._frozen[position].grad
            if gradient is None and not strange:
                continue
            state = "none" if gradient is None else "zero" if all_zero(gradient) else "some"
            self._odd[position] = (state, self._baseline.read(position))

    def after_update(self, optimizer: Optimizer, now: Moment) -> None:
        """Just after it: what it holds and what has changed was changed by it."""
        kind = type(optimizer).__name__
        self.stepped.add(kind)
        if self._last[0] != UPDATE:  # nobody looked just before it
            self.look(UPDATED, now)
            return
        fresh = versions(self._frozen)
        written = {p for p, (_, value) in self._odd.items() if self._baseline.read(p) != value}
        if fresh != self._versions and not of_torch(optimizer):
            # torch's own leave alone what has no gradient
            held = self._held_by(optimizer)
            written.update(p for p in held if fresh[p] != self._versions[p])
        _, at = self._last
        for position in written:
            gradient = self._odd.get(position, ("none", b""))[0]
            flag = self._frozen[position].requires_grad
            name = self._baseline.names[position]
            self.updates.setdefault(name, Update(kind, gradient, flag, at))
            self._versions[position] = fresh[position]
        self._odd.clear()
        self.look(UPDATED, now)

    def _due(self, optimizer: Optimizer) -> bool:
        """Whether to read what has no gradient: in the first steps that could move it, then rarely.

        A step at a learning rate of zero proves nothing.
        """
        if not any(float(group.get("lr") or 0.0) for group in optimizer.param_groups):
            return False
        count = self._steps[id(optimizer)] = self._steps.get(id(optimizer), 0) + 1
        return count <= 3 or count & (count - 1) == 0

    def _held_by(self, optimizer: Optimizer) -> list[int]:
        """Positions of the frozen tensors that an optimizer holds."""
        lengths = tuple(len(group["params"]) for group in optimizer.param_groups)
        known = self._held.get(id(optimizer))
        if known is None or known[0] != lengths:
            of = {id(tensor): position for position, tensor in enumerate(self._frozen)}
            held = [
                of[id(parameter)]
                for group in optimizer.param_groups
                for parameter in group["params"]
                if id(parameter) in of
            ]
            known = self._held[id(optimizer)] = (lengths, held)
        return known[1]
