"""What a scope's calls go through while its prefix is cached."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_freeze.cache.calls import Prefix
from lightning_freeze.cache.content import Content
from lightning_freeze.cache.earlier import Earlier
from lightning_freeze.cache.keys import Call, Unkeyable
from lightning_freeze.cache.probe import Fit, Unfit, close, probe, tolerance_of
from lightning_freeze.cache.reads import names_read
from lightning_freeze.cache.replay import Collected, Replay
from lightning_freeze.cache.rows import Rows
from lightning_freeze.cache.sideways import devices_of, undone
from lightning_freeze.cache.skipped import Leaf, SkippedActivation
from lightning_freeze.cache.stats import CacheStats
from lightning_freeze.cache.store import ENTRY, Full, RowStore

# a few rows are compared with what the frozen part gives, once in so many calls
_VERIFIED = 64
_ROUNDED = 5e-2
# changes of the frozen part in one stage
_MOST_CHANGES = 8


class PrefixCache:
    """Caches one prefix.

    Args:
        prefix: what can be skipped.
        names: module -> its path: rows are found by it in a later stage, too.
        store: where rows are kept.
        stats: is kept up to date.
        later: modules whose output a later stage will need, soonest first.
        samples: rows of a batch -> about how many samples will be seen in an epoch.
        step_aside: is told why nothing is cached any more.
        before: the cache that made the rows in the store.

    Attributes:
        blocked: whether it had to let a call be, as something was hooked into or exchanged.
        training: whether the present batch is one of the training.
    """

    def __init__(
        self,
        prefix: Prefix,
        names: Mapping[nn.Module, str],
        store: RowStore,
        stats: CacheStats,
        later: Sequence[nn.Module] = (),
        samples: Callable[[int], float] = lambda rows: float("inf"),
        step_aside: Callable[[str], None] = lambda reason: None,
        before: PrefixCache | None = None,
    ) -> None:
        self.store = store
        self.stats = stats
        self.fit: Fit | None = None
        self.full = False
        self.forgot = False
        self.blocked = False
        self.training = True
        self._step_aside = step_aside
        self._samples = samples
        self._chosen: frozenset[Leaf] | None = None
        self._over = False
        inner = [module for module in later if module not in prefix.skipped]
        self.replayed = Replay(prefix, inner)
        self.rows = Rows(store, self.replayed, names)
        self._later = [(self.replayed.modules.index(module), 0) for module in later]
        self._per_row = 0.0
        self._missed = False
        self._unverified = False
        self._skipped = frozenset(prefix.skipped)
        self._devices = devices_of(prefix.scope)
        self._calls = 0
        self._ran = 0.0
        self._forgotten = 0
        self.content = Content(prefix.skipped, prefix.around)
        # between frozen layers these may do something else in train mode
        self._minding = [(names[m], m) for m in prefix.around if "training" in _read_by(m)]
        self._earlier: Earlier | None = None
        self._follow(before)
        self._numbers = {self.content.name: self.rows.number}

    @property
    def keeps(self) -> frozenset[Leaf]:
        """Outputs that are kept: those needed now and those of later stages."""
        assert self.fit is not None
        return self.fit.needed.union(self._later if self._chosen is None else self._chosen)

    def _follow(self, before: PrefixCache | None) -> None:
        """Go on with earlier rows if what made them was under observation and hasn't changed."""
        self._before = None
        if before is None or before.fit is None or before.content.changed(all_bytes=True):
            self.store.clear()
        elif before.content.covers(self.content):
            self._before = before
            self.rows.inherit(before.rows)
        elif self.replayed.prefix.scope is before.replayed.prefix.scope and self.content.covers(
            before.content
        ):
            self._earlier = Earlier(before.replayed, before.rows, before.fit, before._beside)
            self._per_row = before._per_row
            self.store.keep(lambda place: place[0] == before.rows.number)
        else:
            self.store.clear()

    def _beside(self) -> str:
        return "|".join(name for name, module in self._minding if module.training)

    def verify_next(self) -> None:
        """At an epoch's start: compare all bytes of the frozen part with what they were.

        And the next batch that is found whole is compared with what the frozen part gives now.
        """
        self._unverified = True
        if not self._missed:
            self._drop_earlier()
        self._missed = False
        if not self.content.whole():
            self._look_again()
        elif self.content.changed(all_bytes=True):
            self._forget()

    def _look_again(self) -> None:
        """Tensors or modules were exchanged."""
        outside = () if self.fit is None else self.fit.outside
        self.content = Content(self.replayed.prefix.skipped, self.replayed.prefix.around, outside)
        self.rows.renew()
        self._numbers = {self.content.name: self.rows.number}
        self._let_go()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The scope's call."""
        original = self.replayed._original
        if self._over or _transformed():
            return original(*args, **kwargs)
        if not self.content.usable():
            self.blocked = True
            return original(*args, **kwargs)
        try:
            call = Call.of(args, kwargs, None if self.fit is None else self.fit.batched)
        except Unkeyable as reason:
            self._leave(str(reason))
            return original(*args, **kwargs)
        if not call.rows:
            return original(*args, **kwargs)
        if self.fit is None or (self.fit.rows == 1 and call.rows > 1):
            # without gradients only what is frozen as a whole shows that nothing in it trains
            if not torch.is_grad_enabled() and not (self.training and self.replayed.whole):
                return original(*args, **kwargs)
            if self.content.changed():  # since it was planned: earlier rows are of what it was
                self._before = None
                self._forget()
                if self._over:
                    return original(*args, **kwargs)
            result, found = probe(self.replayed, call)
            if isinstance(found, Unfit):
                self._leave(str(found))
            else:
                self.fit = found
                self.rows.by_row = found.by_row
                if found.outside:
                    self._look_after(found.outside)
                self._before = None
                self._make_room()
                self._keep_first(call, found.first)
            return result
        if call.spec != self.fit.spec:
            return original(*args, **kwargs)
        return self._cached(call)

    def _look_after(self, outside: Sequence[Tensor]) -> None:
        """The frozen part reads other tensors, too. Were they under observation before?"""
        prefix = self.replayed.prefix
        self.content = Content(prefix.skipped, prefix.around, outside)
        before = self._before
        if before is not None and not before.content.covers(self.content):
            self.rows.renew()
            self.store.clear()
        self._numbers = {self.content.name: self.rows.number}

    def _make_room(self) -> None:
        """Drop what only an earlier stage needed."""
        kept = {self.rows.name(leaf) for leaf in self.keeps}
        number = None if self._earlier is None else self._earlier.rows.number
        self.store.keep(lambda place: place[0] == number or place[2:] in kept)

    def _forget(self) -> None:
        """The frozen part changed. Rows of before stay: averaged weights come and go."""
        name = self.content.name
        known = name in self._numbers
        self._drop_earlier()
        if known:
            self.rows.number = self._numbers.pop(name)
        else:
            self.rows.renew()
        self._numbers[name] = self.rows.number
        if known:
            return
        if len(self._numbers) > 2:
            del self._numbers[next(iter(self._numbers))]
        self._let_go()

    def _let_go(self) -> None:
        self._drop_earlier()
        kept = set(self._numbers.values())
        self.store.keep(lambda place: place[0] in kept)
        self.full = False
        self.forgot = True
        self._forgotten += 1
        if self._forgotten > _MOST_CHANGES and self.stats.hits < self.stats.misses:
            self._leave("the frozen part changes again and again")

    def _leave(self, reason: str) -> None:
        self._over = True
        self._step_aside(reason)

    def _cached(self, call: Call) -> Any:
        began = time.perf_counter()
        assert self.fit is not None
        if self.content.changed():
            self._forget()
            if self._over:
                return self.replayed.plain(call)
        space, keys = call.keys(self._beside())
        self._calls += 1
        self._unverified |= self._calls % _VERIFIED == 0
        missing = self.rows.missing(space, keys, self.fit.needed)
        # nothing of the frozen part is called where all samples are found
        quiet = not missing and not self._unverified and not self.replayed.free
        skipped = self._skipped if quiet else ()
        saved = self.stats.seconds_saved
        with undone(self.replayed.prefix.scope, skipped, self._devices) as undo:
            try:
                fresh = self._compute(call, space, keys, missing)
                values = {
                    leaf: self.rows.joined(
                        space, leaf, keys, [(rows, found[leaf]) for rows, found in fresh]
                    )
                    for leaf in self.fit.needed
                }
                self._verify(call, values, missing)
                looked = time.perf_counter()
                shaped = self.rows.shaped(space, call.rows)
                result = self.replayed.replay(call, shaped, values)
            except Exception as error:
                undo()
                self.stats.seconds_saved = saved
                result = self.replayed.plain(call)  # an error of the model's own comes again here
                self._leave(_because(error))
                return result
        self._missed |= bool(missing)
        self.stats.misses += len(missing)
        self.stats.hits += call.rows - len(missing)
        self.stats.nbytes = max(self.stats.nbytes, self.store.nbytes)
        overhead = looked - began - self._ran
        self.stats.seconds_saved += self._per_row * (call.rows - len(missing)) - overhead
        return result

    def _compute(
        self, call: Call, space: bytes, keys: Sequence[bytes], missing: Sequence[int]
    ) -> list[tuple[Sequence[int], dict[Leaf, Tensor]]]:
        """Run the frozen part for the missing samples, and keep what it gives.

        Returns:
            Positions of samples, and what is needed of them.
        """
        self._ran = 0.0
        if not missing:
            return []
        assert self.fit is not None
        there, start = ([], None) if self._earlier is None else self._earlier.start(call, missing)
        known = set(there)
        fresh: list[tuple[Sequence[int], dict[Leaf, Tensor]]] = []
        for rows, begin in (([r for r in missing if r not in known], None), (there, start)):
            if not rows:
                continue
            found = self.replayed.collect(call, rows, self.keeps, begin)
            self._ran += found.seconds
            each = found.seconds / len(rows)
            if begin is None:
                self._per_row = min(self._per_row or each, each)
            else:
                self.stats.seconds_saved += len(rows) * max(0.0, self._per_row - each)
                self.stats.shortened += len(rows)
            self.rows.learn(space, found.outputs)
            # what is needed now comes first where there isn't room for all
            leaves = self._in_order(found.values)
            self._keep(space, [keys[row] for row in rows], found.values, leaves)
            fresh.append((rows, {leaf: found.values[leaf] for leaf in self.fit.needed}))
        return fresh

    def _keep_first(self, call: Call, first: Collected) -> None:
        """The batch that was tried out needn't be computed again."""
        assert self.fit is not None
        space, keys = call.keys(self._beside())
        self.rows.learn(space, first.outputs)
        values, first.values = first.values, {}
        try:
            self._keep(space, keys, values, sorted(self.fit.needed))
        except OSError as error:
            self._leave(_because(error))
            return
        self._missed = True
        self.stats.misses += call.rows
        self.stats.nbytes = max(self.stats.nbytes, self.store.nbytes)

    def _keep(
        self,
        space: bytes,
        keys: Sequence[bytes],
        values: dict[Leaf, Tensor],
        leaves: Sequence[Leaf],
    ) -> None:
        for leaf in leaves:
            value = values[leaf]
            while not self.full and value.dim() and value.shape[0] == len(keys):
                try:
                    self.rows.put(space, leaf, keys, value)
                    break
                except Full:
                    self.full = self._earlier is None
                    self._drop_earlier()

    def _drop_earlier(self) -> None:
        if self._earlier is not None:
            number = self._earlier.rows.number
            self._earlier = None
            self.store.keep(lambda place: place[0] != number)

    def _in_order(self, values: dict[Leaf, Tensor]) -> list[Leaf]:
        """What is needed now, then what later stages will need, as far as all samples of it fit."""
        assert self.fit is not None
        needed = sorted(self.fit.needed)
        if self._chosen is None:
            samples = self._samples(self.fit.rows)
            room = self.store.max_bytes - samples * sum(self._size(values[leaf]) for leaf in needed)
            chosen = []
            for leaf in self._later:
                size = self._size(values[leaf]) if leaf in values else 0
                if not size or samples * size > room:
                    break
                room -= samples * size
                chosen.append(leaf)
            self._chosen = frozenset(chosen)
        return needed + [leaf for leaf in self._later if leaf in self._chosen - self.fit.needed]

    def _size(self, value: Tensor) -> int:
        each = value[0].numel() if value.dim() and len(value) else 0
        return each * (self.store.dtype or value.dtype).itemsize + ENTRY

    def _verify(self, call: Call, values: dict[Leaf, Tensor], missing: Sequence[int]) -> None:
        """Compare a few of the rows that were found with what the frozen part gives now."""
        if not self._unverified or len(missing) == call.rows:
            return
        self._unverified = False
        assert self.fit is not None
        absent = set(missing)
        there = [row for row in range(call.rows) if row not in absent]
        rows = [there[0], there[-1]] if len(there) > 1 else there
        now = self.replayed.collect(call, rows, self.fit.needed)
        tolerance = tolerance_of(self.replayed.prefix.skipped)
        if self.store.dtype is not None:
            tolerance = max(tolerance, _ROUNDED)
        for leaf, value in values.items():
            if not close(value[rows], now.values[leaf], tolerance):
                raise SkippedActivation("the frozen part gives something else now", frozenset())


def _read_by(module: nn.Module) -> frozenset[str]:
    kind: Any = type(module)
    return names_read(kind)


def _transformed() -> bool:
    """Whether the call is inside of `torch.func.grad`, `vmap` and the like."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _because(error: Exception) -> str:
    if isinstance(error, SkippedActivation):
        return f"activations that were left out are used: {error}"
    if isinstance(error, OSError):
        return f"its file can't be written: {error.strerror}"
    return f"leaving the frozen part out fails with {type(error).__name__}: {error}"
