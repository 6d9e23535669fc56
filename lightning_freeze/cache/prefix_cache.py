"""What a scope's calls go through while its prefix is cached."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_freeze.cache.calls import Prefix
from lightning_freeze.cache.content import Content
from lightning_freeze.cache.keys import Call, Unkeyable
from lightning_freeze.cache.probe import Fit, Unfit, close, probe, tolerance_of
from lightning_freeze.cache.reads import names_read
from lightning_freeze.cache.replay import Output, Replay
from lightning_freeze.cache.sideways import undone
from lightning_freeze.cache.skipped import Layout, Leaf, SkippedActivation
from lightning_freeze.cache.store import ENTRY, Full, RowStore

# a few rows are compared with what the frozen part gives, once in so many calls
_VERIFIED = 64
_ROUNDED = 5e-2
# changes of the frozen part in one stage
_MOST_CHANGES = 8
# shapes that batches are padded to, and the like
_MOST_SPACES = 10_000
_NUMBERS = itertools.count()


@dataclass
class CacheStats:
    """What a cache has done in a fit.

    Attributes:
        hits: samples whose frozen part wasn't computed.
        misses: samples whose frozen part was computed, and kept where there was room.
        nbytes: the most memory (or disk) that rows and keys took.
        seconds_saved: time that the frozen part would have taken, less that of looking up.
        skipped: what is left out now, in words; "" if nothing.
        aside: why the cache does nothing any more; "" if it does.
    """

    hits: int = 0
    misses: int = 0
    nbytes: int = 0
    seconds_saved: float = 0.0
    skipped: str = ""
    aside: str = ""

    @property
    def hit_rate(self) -> float:
        """Share of the samples whose frozen part wasn't computed."""
        return self.hits / max(1, self.hits + self.misses)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "hit_rate": self.hit_rate}


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
        # the second call of a module has rows of its own
        called: Counter[nn.Module] = Counter()
        self._names = []
        for module in self.replayed.modules:
            again = f" #{called[module]}" if called[module] else ""
            self._names.append(names[module] + again)
            called[module] += 1
        self._later = [(self.replayed.modules.index(module), 0) for module in later]
        self._outputs: dict[bytes, dict[int, Output]] = {}
        self._per_row = 0.0
        self._unverified = False
        self._calls = 0
        self._ran = 0.0
        self._forgotten = 0
        self.content = Content(prefix.skipped, prefix.around)
        # between frozen layers these may do something else in train mode
        self._minding = [(names[m], m) for m in prefix.around if "training" in _read_by(m)]
        self._before = before
        self._began()
        self._trust(all_bytes=True)

    @property
    def keeps(self) -> frozenset[Leaf]:
        """Outputs that are kept: those needed now and those of later stages."""
        assert self.fit is not None
        return self.fit.needed.union(self._later if self._chosen is None else self._chosen)

    def _began(self) -> None:
        """Rows are kept under a number that stands for what made them."""
        self._number: int = next(_NUMBERS) if self._before is None else self._before._number
        self._numbers = {self.content.name: self._number}

    def _trust(self, *, all_bytes: bool = False) -> None:
        """Forget rows unless what makes them was under observation and hasn't changed."""
        before = None if self._before is None else self._before.content
        if before is None or not before.covers(self.content) or before.changed(all_bytes=all_bytes):
            self._before = None
            self._began()
            self.store.clear()

    def verify_next(self) -> None:
        """At an epoch's start: compare all bytes of the frozen part with what they were.

        And the next batch that is found whole is compared with what the frozen part gives now.
        """
        self._unverified = True
        if not self.content.whole():
            self._look_again()
        elif self.content.changed(all_bytes=True):
            self._forget()

    def _look_again(self) -> None:
        """Tensors or modules were exchanged."""
        outside = () if self.fit is None else self.fit.outside
        self.content = Content(self.replayed.prefix.skipped, self.replayed.prefix.around, outside)
        self._number = next(_NUMBERS)
        self._numbers = {self.content.name: self._number}
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
            self.content.changed()
            result, found = probe(self.replayed, call)
            if isinstance(found, Unfit):
                self._leave(str(found))
            else:
                self.fit = found
                if found.outside:
                    prefix = self.replayed.prefix
                    self.content = Content(prefix.skipped, prefix.around, found.outside)
                    self._began()
                    self._trust()
                self._before = None
                self._make_room()
            return result
        if call.spec != self.fit.spec:
            return original(*args, **kwargs)
        return self._cached(call)

    def _make_room(self) -> None:
        """Drop what only an earlier stage needed."""
        kept = {(self._names[number], leaf) for number, leaf in self.keeps}
        self.store.keep(lambda place: place[2:] in kept)

    def _forget(self) -> None:
        """The frozen part changed. Rows of before stay: averaged weights come and go."""
        name = self.content.name
        known = name in self._numbers
        self._number = self._numbers.pop(name) if known else next(_NUMBERS)
        self._numbers[name] = self._number
        if known:
            return
        if len(self._numbers) > 2:
            del self._numbers[next(iter(self._numbers))]
        self._let_go()

    def _let_go(self) -> None:
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
        modes = [name for name, module in self._minding if module.training]
        space, keys = call.keys("|".join(modes))
        self._calls += 1
        self._unverified |= self._calls % _VERIFIED == 0
        missing: Sequence[int] = sorted(
            set().union(*(self.store.missing(self._place(space, n), keys) for n in self.fit.needed))
        )
        if space not in self._outputs:
            missing = range(call.rows)
        with undone(self.replayed.prefix.scope) as undo:
            try:
                fresh = self._compute(call, space, keys, missing)
                values = self._values(call, space, keys, missing, fresh)
                self._verify(call, values, missing)
                looked = time.perf_counter()
                result = self.replayed.replay(call, self._shaped(space, call), values)
            except Exception as error:
                undo()
                result = self.replayed.plain(call)  # an error of the model's own comes again here
                self._leave(_because(error))
                return result
        self.stats.misses += len(missing)
        self.stats.hits += call.rows - len(missing)
        self.stats.nbytes = max(self.stats.nbytes, self.store.nbytes)
        overhead = looked - began - self._ran
        self.stats.seconds_saved += self._per_row * (call.rows - len(missing)) - overhead
        return result

    def _place(self, space: bytes, leaf: Leaf) -> tuple[int, bytes, str, int]:
        return (self._number, space, self._names[leaf[0]], leaf[1])

    def _compute(
        self, call: Call, space: bytes, keys: Sequence[bytes], missing: Sequence[int]
    ) -> dict[Leaf, Tensor]:
        """Run the frozen part for the missing samples, and keep what it gives."""
        self._ran = 0.0
        if not missing:
            return {}
        assert self.fit is not None
        found = self.replayed.collect(call, missing, self.keeps)
        self._ran = found.seconds
        plain = [_plain(outputs) for outputs in (self._outputs.get(space), found.outputs)]
        if plain[0] is not None and plain[0] != plain[1]:
            raise SkippedActivation("a frozen layer returns other numbers now", frozenset())
        if len(self._outputs) > _MOST_SPACES:
            self._outputs.clear()
        self._outputs[space] = found.outputs
        each = found.seconds / len(missing)
        self._per_row = min(self._per_row or each, each)
        kept = [keys[row] for row in missing]
        # what is needed now comes first where there isn't room for all
        for leaf in self._in_order(found.values):
            value = found.values[leaf]
            if self.full or not value.dim() or value.shape[0] != len(missing):
                continue
            try:
                self.store.put(self._place(space, leaf), kept, value)
            except Full:
                self.full = True
        return {leaf: found.values[leaf] for leaf in self.fit.needed}

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

    def _values(
        self,
        call: Call,
        space: bytes,
        keys: Sequence[bytes],
        missing: Sequence[int],
        fresh: dict[Leaf, Tensor],
    ) -> dict[Leaf, Tensor]:
        assert self.fit is not None
        if len(missing) == call.rows:
            return fresh
        absent = set(missing)
        there = [row for row in range(call.rows) if row not in absent]
        found = {}
        for leaf in self.fit.needed:
            layout = self._outputs[space][leaf[0]].leaves[leaf[1]]
            place = self._place(space, leaf)
            stored = self.store.get(place, [keys[i] for i in there], layout.dtype, layout.device)
            if missing:
                whole = stored.new_empty((call.rows, *stored.shape[1:]))
                if fresh[leaf].shape[1:] != stored.shape[1:] or fresh[leaf].dtype != stored.dtype:
                    raise SkippedActivation("outputs have another shape now", frozenset())
                whole[torch.tensor(there, device=whole.device)] = stored
                whole[torch.tensor(missing, device=whole.device)] = fresh[leaf]
                stored = whole
            found[leaf] = layout.arranged(stored)
        return found

    def _shaped(self, space: bytes, call: Call) -> dict[int, Output]:
        """What skipped calls return, for this number of samples."""
        assert self.fit is not None
        found = {}
        for number, output in self._outputs[space].items():
            leaves = []
            for position, leaf in enumerate(output.leaves):
                if isinstance(leaf, Layout) and (number, position) in self.fit.by_row:
                    shape = torch.Size((call.rows, *leaf.shape[1:]))
                    leaf = Layout(shape, leaf.dtype, leaf.device, leaf.order)
                leaves.append(leaf)
            found[number] = Output(output.spec, tuple(leaves))
        return found

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


def _plain(outputs: dict[int, Output] | None) -> Any:
    """What skipped calls return beside tensors."""
    if outputs is None:
        return None
    return [
        (number, position, type(leaf), leaf)
        for number, output in outputs.items()
        for position, leaf in enumerate(output.leaves)
        if not isinstance(leaf, Layout)
    ]


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
