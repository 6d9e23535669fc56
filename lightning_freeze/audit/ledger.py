"""What a model was declared to be and what its frozen tensors were, to compare with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from itertools import chain

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_freeze.audit.baseline import Baseline, Moment, Place
from lightning_freeze.audit.causes import why_average, why_buffer_changed, why_changed
from lightning_freeze.audit.declared import Declared, weights_in_buffers
from lightning_freeze.audit.findings import Seen
from lightning_freeze.audit.holdings import held_by
from lightning_freeze.audit.identity import overlapping, replaced, split_ties
from lightning_freeze.audit.leftovers import left_over
from lightning_freeze.audit.roster import Roster
from lightning_freeze.audit.scene import Scene, shared_memory
from lightning_freeze.audit.switches import awake, by_batch, flipped
from lightning_freeze.digests import digests
from lightning_freeze.engine.flags import can_train
from lightning_freeze.model.index import ModelIndex, some


class Ledger:
    """Compares a model with its declaration.

    Attributes:
        model: the model.
        index: its names when the ledger was made.
        declared: what holds now; what `requires_grad` says where nothing was declared.
        baseline: what the frozen tensors were, parameters first, then buffers.
        flags: for each parameter, whether it should require a gradient.
        also: paths of modules beside the frozen ones whose buffers are compared, once they are
            watched (see `watch_buffers`).

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

    def __init__(
        self,
        model: nn.Module,
        declared: Declared | None = None,
        *,
        index: ModelIndex | None = None,
        now: Moment = (0, 0),
    ) -> None:
        """Take everything down.

        Args:
            model: any module.
            declared: what holds; what `requires_grad` says where None.
            index: of the model, if there is one already.
            now: epoch and optimizer step.
        """
        self.model = model
        self.index = ModelIndex.of(model) if index is None else index
        self._roster = Roster(model)
        self._spoilt: set[str] = set()
        self.also: tuple[str, ...] = ()
        self._moving: frozenset[str] = frozenset()
        self.baseline = Baseline()
        self.declare(Declared.by_flags(self.index) if declared is None else declared, now)

    def declare(self, declared: Declared, now: Moment = (0, 0)) -> None:
        """Take over a new declaration; what stays frozen keeps its older baseline."""
        self.declared = declared
        self.shared, self._twins = shared_memory(self.index)
        # what can't require a gradient isn't asked to
        self.flags = bytes(
            name not in declared.frozen and name not in declared.ignored and can_train(parameter)
            for name, parameter in self.index.parameters.items()
        )
        if self.also:
            known = set(weights_in_buffers(self.index, declared))
            self.also = tuple(path for path in self.also if path in known)
        self._take_down(now)

    def _take_down(self, now: Moment) -> None:
        parameters = self.index.parameters.items()
        places = chain(
            ((n, p) for n, p in parameters if n in self.declared.frozen),
            _buffers(self.index, self.declared, self.declared.still),
            (
                (name, place)
                for name, place in _buffers(self.index, self.declared, self.also)
                if name not in self._moving
            ),
        )
        self.baseline = Baseline.of(places, now, self.baseline)

    def watch_buffers(self, now: Moment) -> bool:
        """Before a first step: also compare buffers that may be weights.

        Args:
            now: epoch and optimizer step.

        Returns:
            Whether there are any that weren't compared before.
        """
        found = weights_in_buffers(self.index, self.declared)
        if found == self.also:
            return False
        self.also = found
        self._take_down(now)
        return True

    def let_move(self, now: Moment) -> bool:
        """Behind the first step: what of those was written in it, moves by design.

        Args:
            now: epoch and optimizer step.

        Returns:
            Whether any was.
        """
        names = {name for name, _ in _buffers(self.index, self.declared, self.also)}
        positions = [p for p, name in enumerate(self.baseline.names) if name in names]
        moved = {self.baseline.names[p] for p in self.baseline.changed(positions)}
        self._moving |= moved
        if moved:
            self._take_down(now)
        return bool(moved)

    def digests(self) -> dict[str, str]:
        """Name -> fingerprint of every frozen parameter and buffer when it was frozen."""
        return dict(zip(self.baseline.names, self.baseline.fingerprints()))

    @property
    def quiet(self) -> dict[str, nn.Module]:
        """Path -> module of what must be in eval mode."""
        return {path: self.index.modules[path] for path in self.declared.quiet}

    def now(self) -> ModelIndex:
        """The names of the model as it is; made anew only if any object is another one."""
        return self.index if self._roster.fits(self.model) else ModelIndex.of(self.model)

    def check(
        self,
        scene: Scene | None = None,
        *,
        flags: bool = True,
        only: Collection[int] | None = None,
        always: Collection[str] = (),
    ) -> list[Seen]:
        """Compare the model with the declaration.

        Args:
            scene: what to look at for causes.
            flags: also compare flags and modes.
            only: positions of the baseline to compare; all where None.
            always: names of what has been frozen since the fit began.
        """
        scene = Scene(shared=self.shared) if scene is None else scene
        now = self.now()
        seen: list[Seen] = []
        if now is not self.index:
            held = held_by(scene.optimizers)
            seen += split_ties(self.index, now) + replaced(self.index, now, held)
            self._follow_buffers(now)
            seen += self._without_owner(now)
        if self.shared:
            held = held_by(scene.optimizers)
            names = frozenset(now.name_of[key] for key in held if key in now.name_of)
            seen += overlapping(self.shared, names)
        changed = self.baseline.changed(only)
        seen += self.changes(changed, scene, now)
        if flags and (now is not self.index or not self._as_declared()):
            trace = scene.trace
            flips, modes = (trace.flips, trace.modes) if trace else ({}, {})
            seen += flipped(self.index, now, self.declared, flips, scene.who)
            seen += awake(self.index, now, self.declared.quiet, modes, scene.who)
        if flags:
            seen += by_batch(now, self.declared.still)
        if only is None:
            seen += self.drifting(scene, changed)
        return seen + left_over(lambda: self._frozen(now), scene.optimizers, always)

    @property
    def trainable(self) -> list[str]:
        """Names of what was declared to train."""
        return [name for name, trains in zip(self.index.parameters, self.flags) if trains]

    def _as_declared(self) -> bool:
        """Whether all flags and modes are what was declared: a quick look at the same objects."""
        ignored, parameters = self.declared.ignored, self.index.parameters
        flags = bytes(p.requires_grad for p in parameters.values())
        if ignored:
            flags = bytes(on and name not in ignored for name, on in zip(parameters, flags))
        modules = self.index.modules
        return flags == self.flags and not any(
            modules[path].training for path in self.declared.quiet
        )

    def _frozen(self, now: ModelIndex) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in zip(self.baseline.names, self.baseline.parameters()):
            if now is self.index:
                yield name, parameter
            elif name in now.canonical:
                yield name, now.parameters[now.canonical[name]]

    def changes(
        self, positions: Iterable[int], scene: Scene, now: ModelIndex | None = None
    ) -> list[Seen]:
        """Findings for frozen tensors that changed: one for each cause.

        Args:
            positions: which tensors of the baseline.
            scene: what to look at for causes.
            now: the model as it is; what isn't in it is told of as replaced.
        """
        listed = [p for p in positions if now is None or self._present(p, now)]
        if not listed:
            return []
        scene = replace(scene, shared=self._moving_partners(scene), twins=self._twins)
        names = self.baseline.names
        self._spoilt.update(names[p] for p in listed)
        groups: dict[tuple[str, tuple[str, str]], list[str]] = {}
        for position in listed:
            if self.baseline.is_buffer(position):
                why = why_buffer_changed(self.baseline, position, scene)
                key = ("frozen-buffer-changed", why)
            else:
                key = ("frozen-changed", why_changed(self.baseline, position, scene))
            groups.setdefault(key, []).append(names[position])
        return [
            Seen(
                code,
                tuple(members),
                f"{some(members)} changed although frozen"
                if code == "frozen-changed"
                else f"the buffers {some(members)} of frozen modules changed",
                *why,
                since=None if scene.trace is None else scene.trace.since(members),
            )
            for (code, why), members in groups.items()
        ]

    def _follow_buffers(self, now: ModelIndex) -> None:
        """Where a module took the place of another, its buffers took that of the other's."""
        for position, name in enumerate(self.baseline.names):
            if self.baseline.is_buffer(position):
                module = now.modules.get(now.owner(name))
                if module is not None and module is not self.baseline.owner(position):
                    self.baseline.move(position, module)

    def _without_owner(self, now: ModelIndex) -> list[Seen]:
        """Buffers of modules without parameters that aren't in the model any more."""
        there = {id(module) for module in now.modules.values()}
        names = []
        for position, name in enumerate(self.baseline.names):
            owner = self.baseline.owner(position)
            if owner is not None and id(owner) not in there and not list(owner.parameters()):
                names.append(name)
        if not names:
            return []
        path = now.owner(names[0])
        there_now = type(now.modules[path]).__name__ if path in now.modules else "nothing"
        return [
            Seen(
                "parameter-replaced",
                tuple(names),
                f"the module of the buffers {some(names)} isn't in the model any more",
                f"At `{path}` there is {there_now} now.",
                "Change the model before the fit.",
            )
        ]

    def _moving_partners(self, scene: Scene) -> dict[str, str]:
        """Of the tensors that share memory with frozen ones, those that an optimizer moves."""
        return {
            frozen: partner
            for frozen, partner in scene.shared.items()
            if not scene.optimizers or scene.learning_rate(self.index.parameters[partner])
        }

    def _present(self, position: int, now: ModelIndex) -> bool:
        if self.baseline.is_buffer(position):
            path = now.owner(self.baseline.names[position])
            return now.modules.get(path) is self.baseline.owner(position)
        return id(self.baseline.tensor(position)) in now.name_of

    def drifting(self, scene: Scene, changed: Collection[int] = ()) -> list[Seen]:
        """Averages whose copy of a frozen tensor isn't that tensor any more.

        Args:
            scene: with the averages.
            changed: positions of tensors that have changed themselves.
        """
        seen = []
        for average in scene.averages:
            if not average.used:
                continue
            copies = average.tensors()
            frozen = [
                (position, name)
                for position, name in enumerate(self.baseline.names)
                if name in copies
                and position not in changed
                and name not in self._spoilt  # then the average lags behind
                and not self.baseline.is_buffer(position)
            ]
            source = [self.baseline.tensor(position) for position, _ in frozen]
            before = digests([tensor for tensor in source if tensor is not None])
            after = digests([copies[name] for _, name in frozen])
            names = [n for (_, n), old, new in zip(frozen, before, after) if old != new]
            if names:
                _, fix = why_average(average.label)
                seen.append(
                    Seen(
                        "frozen-changed",
                        tuple(names),
                        f"the copy of {some(names)} that `{average.label}` keeps has changed "
                        "although frozen",
                        f"`{average.label}` averages weights, and the average of equal numbers is "
                        "rounded; it is what validation, checkpoints and the end of the fit get.",
                        fix,
                    )
                )
        return seen


def _buffers(
    index: ModelIndex, declared: Declared, paths: Iterable[str]
) -> Iterator[tuple[str, Place]]:
    """Buffers that are part of the weights; derived ones (non-persistent) may be recomputed."""
    for path in paths:
        module = index.modules[path]
        for key, buffer in module._buffers.items():
            name = f"{path}.{key}" if path else key
            if (
                isinstance(buffer, Tensor)
                and not is_lazy(buffer)
                and key not in module._non_persistent_buffers_set
                and name not in declared.ignored
            ):
                yield name, (module, key)
