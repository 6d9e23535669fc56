"""The checks that need no baseline: optimizers and schedulers, gradients, ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_freeze.audit.findings import Seen
from lightning_freeze.names import ModelIndex, some


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
                f"{some(missing)} should train but is in no optimizer",
                "`configure_optimizers` leaves it out.",
                "Give the optimizer all parameters that will ever train.",
            )
        )
    for scheduler in _with_inner(schedulers):
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


def _with_inner(schedulers: Iterable[Any]) -> Iterator[Any]:
    """Schedulers and those that they chain."""
    for scheduler in schedulers:
        yield scheduler
        yield from _with_inner(getattr(scheduler, "_schedulers", None) or ())


def check_ranks(digests: Sequence[Mapping[str, str]]) -> list[Seen]:
    """Compare fingerprints of the same names across ranks, given in the order of ranks."""
    every = dict.fromkeys(name for digest in digests for name in digest)
    different = [name for name in every if len({digest.get(name) for digest in digests}) > 1]
    if not different:
        return []
    ranks = [
        str(rank)
        for rank, other in enumerate(digests)
        if any(other.get(name) != digests[0].get(name) for name in different)
    ]
    return [
        Seen(
            "rank-mismatch",
            tuple(different),
            f"{some(different)} differ between rank 0 and rank {', '.join(ranks)}",
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
