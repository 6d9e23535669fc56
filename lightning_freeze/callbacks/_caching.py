"""What one fit does with a cache of frozen features."""

from __future__ import annotations

from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any

from torch import nn

from lightning_freeze.cache.calls import Node, Prefix, find_prefix, is_compiled, traced
from lightning_freeze.cache.prefix_cache import PrefixCache
from lightning_freeze.cache.reads import names_read
from lightning_freeze.cache.stats import CacheStats
from lightning_freeze.cache.store import RowStore
from lightning_freeze.callbacks._lightning import LightningModule, Trainer, is_a, rank_zero_warn
from lightning_freeze.callbacks._sharded import restores_late
from lightning_freeze.callbacks.fit_state import fit_state_of
from lightning_freeze.engine.sharded import is_sharded

_REQUIRES_GRAD = attrgetter("requires_grad")
_SELDOM = 0.1
# of an epoch's samples, when those of the epochs before are enough to judge by
_MOST = 0.75
# seconds that may be lost before it is a reason
_LOST = 1.0
# in a fit, where few samples are found
_MOST_PLANS = 100
# hooks and modules that are exchanged in a fit
_MOST_ANEW = 10
# of a LightningModule
_CLOCK = frozenset({"global_step", "current_epoch", "trainer"})


def _in_parts(parameter: nn.Parameter) -> bool:
    return is_sharded(parameter) or hasattr(parameter, "ds_id")  # DeepSpeed


def _reads_clock(prefix: Prefix) -> str:
    """Why the frozen part may give something else at another step; "" where it doesn't."""
    for module in dict.fromkeys((*prefix.around, *prefix.skipped)):
        kind: Any = type(module)
        read = sorted(names_read(kind) & _CLOCK) if is_a(module, "LightningModule") else []
        if read:
            return (
                f"`{kind.__name__}.forward` reads `{read[0]}`, which its frozen part may depend on "
                "(read it in `training_step`)"
            )
    return ""


class Caching:
    """One fit."""

    def __init__(
        self, trainer: Trainer, module: LightningModule, store: RowStore, stats: CacheStats
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.store = store
        self.stats = stats
        self.cache: PrefixCache | None = None
        self._before: PrefixCache | None = None
        self._names = {m: name for name, m in reversed(list(module.named_modules()))}
        self._parameters = list(module.parameters())
        self._flags = b""
        self._traced_with = b""
        self._said: set[str] = set()
        self._tree: Node | None = None
        self._tracing: AbstractContextManager[Node] | None = None
        self._epoch_began = (0, 0, 0.0)
        self._planned = 0
        self._found = False
        self._anew = 0
        self._plans = 0
        self._validated = False

    @property
    def useless(self) -> bool:
        """Whether it looked for frozen layers, and found none that may be left out, nor why."""
        return self._plans > 0 and not self._found and not self._said

    def begin(self, *, may_plan: bool, first: bool = False) -> None:
        """Before a batch.

        Args:
            may_plan: whether it is one of the training.
            first: of a validation. Weights are exchanged for it, and back.
        """
        self.end()  # a batch that was broken off
        if self.stats.aside:
            return
        if first or (may_plan and self._validated):
            self._validated = first
            if self.cache is not None and self.cache.fit is not None:
                self.cache.verify_next()
                if self.stats.aside:
                    return
        flags = bytes(map(_REQUIRES_GRAD, self._parameters))
        if may_plan and self.cache is not None and self.cache.blocked and self._anew < _MOST_ANEW:
            self._anew += 1
            self._tree, self._before, self.cache = None, self.cache, None
        if flags != self._flags:
            if not may_plan:
                return
            # what has frozen since may not need a gradient any more
            if any(was and not now for was, now in zip(self._traced_with, flags)):
                self._tree = None
            self._flags = flags
            self._plan()
        if self.cache is not None:
            self.cache.training = may_plan
            self.cache.replayed.install(self._called)
        elif self._tree is None and may_plan:
            if any(is_compiled(module) for module in self.module.modules()):
                self._aside("the model is compiled")
                return
            if restores_late(self.trainer) or any(map(_in_parts, self._parameters)):
                self._aside("the model's tensors are sharded over ranks")
                return
            self._traced_with = flags
            self._tracing = traced(self.module)
            self._traced = self._tracing.__enter__()

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        """The scope's call. In the step `train()` may have been called, which doesn't hold."""
        assert self.cache is not None
        fit = fit_state_of(self.trainer)
        if fit is not None and fit.applier is not None:
            fit.applier.reassert()
        return self.cache(*args, **kwargs)

    def end(self) -> None:
        """After a batch."""
        if self.cache is not None:
            self.cache.replayed.remove()
        if self._tracing is not None:
            tracing, self._tracing = self._tracing, None
            tracing.__exit__(None, None, None)
            # nothing was called in it, such as where a step is skipped
            self._tree = self._traced if self._traced.children else None
            self._plan()
        if self.stats.aside:
            self.cache = None
            self.store.clear()

    def stop(self) -> None:
        """After the fit."""
        self.end()
        self.cache = None
        self.store.clear()

    def epoch_starts(self) -> None:
        """Counts begin anew."""
        self._epoch_began = (self.stats.hits, self.stats.misses, self.stats.seconds_saved)
        if self.cache is not None and self.cache.fit is not None:
            self.cache.verify_next()

    def epoch_ends(self) -> None:
        """Step aside where samples don't come back."""
        self.end()
        if self.cache is None or self.cache.fit is None:
            return
        if self.cache.forgot:
            self.cache.forgot, self._planned = False, self.stats.hits + self.stats.misses
        hits_before, misses_before, saved_before = self._epoch_began
        hits, misses = self.stats.hits - hits_before, self.stats.misses - misses_before
        seen_before = hits_before + misses_before - self._planned
        whole = self.cache.fit.rows * self.trainer.num_training_batches
        if seen_before <= _MOST * max(hits + misses, whole if whole < float("inf") else 0):
            return  # they had no chance to come back
        saved = self.stats.seconds_saved
        if hits and saved < -_LOST and saved < saved_before:
            self._aside("looking up takes longer than the frozen layers")
        elif hits < _SELDOM * (hits + misses):
            self._aside(
                f"samples don't come back (hits: {100 * hits / max(1, hits + misses):.0f} %): they "
                "are augmented at random, padded to other lengths, or there is room for few"
            )

    def _plan(self) -> None:
        """Find out what can be left out now."""
        if self.cache is not None and self.cache.fit is not None:
            self._before = self.cache
        self.cache = None
        self._planned = self.stats.hits + self.stats.misses
        if self._tree is None:
            return
        self._plans += 1
        if self._plans > _MOST_PLANS and self.stats.hits < self.stats.misses:
            self._aside("what is frozen changes too often")
            return
        prefix, reason = find_prefix(self._tree, names=self._names)
        if prefix is not None and prefix.late and self._traced_with != self._flags:
            self._tree = None  # what comes before may train by now
            return
        clock = "" if prefix is None else _reads_clock(prefix)
        prefix, reason = (None, clock) if clock else (prefix, reason)
        if reason and reason not in self._said:
            self._said.add(reason)
            does = "does nothing for now" if prefix is None else "leaves out less than it could"
            rank_zero_warn(f"FrozenFeatureCache {does}: {reason}.")
        if prefix is None:
            self._before = None
            self.stats.skipped = ""
            self.store.clear()
            return
        self._found = True
        later = self._later(prefix)
        self.cache = PrefixCache(
            prefix,
            self._names,
            self.store,
            self.stats,
            later,
            self._samples,
            self._aside,
            self._before,
        )
        self._before = None
        names = [self._names[m] or type(m).__name__ for m in prefix.skipped]
        self.stats.skipped = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"

    def _later(self, now: Prefix) -> list[nn.Module]:
        """The modules that will be the last of a later stage's prefix, soonest first."""
        fit = fit_state_of(self.trainer)
        if self._tree is None or fit is None or fit.index is None:
            return []
        found: dict[nn.Module, None] = {}
        parameters = fit.index.parameters
        for frozen in fit.upcoming():
            still = {id(parameters[name]) for name in frozen}

            def trains(parameter: nn.Parameter, still: set[int] = still) -> bool:
                return id(parameter) not in still

            then, _ = find_prefix(self._tree, trains)
            if then is not None and then.scope is now.scope:
                found[then.skipped[-1]] = None
        found.pop(now.skipped[-1], None)
        called = [node.module for node in self._tree.walk()]
        return [module for module in found if called.count(module) == 1]

    def _samples(self, rows: int) -> float:
        """About how many samples an epoch has, of batches of so many rows."""
        return rows * (self.trainer.num_training_batches + sum(self.trainer.num_val_batches))

    def _aside(self, reason: str) -> None:
        self.stats.aside = reason
        self.stats.skipped = ""
        rank_zero_warn(f"FrozenFeatureCache does nothing any more: {reason}.")
