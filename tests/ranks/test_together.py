"""Where one rank fails, all raise together: none is left waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch import Callback

from lightning_freeze import FreezeBackbone, GradualUnfreeze, ReinitTopLayers, TrainableParamAudit
from lightning_freeze.engine.distributed import from_all_ranks, together
from tests.ranks.fits import OwnData, fit, sgd
from tests.ranks.processes import on_ranks


class Boom(RuntimeError):
    """What one rank alone raises."""


def breaks(owner: Any, name: str, nth: int = 1) -> Any:
    """Let the n-th call of an object's method raise."""
    method, calls = getattr(owner, name), []

    def broken(*given: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == nth:
            raise Boom(f"{name} broke")
        return method(*given, **named)

    setattr(owner, name, broken)
    return owner


def breaks_switch(rank: int) -> list[Any]:
    """The optimizer of rank 1 fails at the second change of what trains."""
    from lightning_freeze.engine.optimizers import OptimizerGroups

    if rank:
        breaks(OptimizerGroups, "sync", nth=2)
    return [GradualUnfreeze(), TrainableParamAudit(table=False)]


def breaks_check(rank: int) -> list[Any]:
    from lightning_freeze.audit.run import AuditRun

    if rank:
        breaks(AuditRun, "check", nth=2)
    return [GradualUnfreeze(), TrainableParamAudit(table=False)]


# a fit in which rank 1 fails alone -> what it raises, and what the other is told
FITS: dict[str, tuple[Callable[[int], list[Any]], str]] = {
    "selector": (
        lambda rank: [FreezeBackbone(("backbone", "nowhere")[rank]), TrainableParamAudit()],
        "SelectorError: ",
    ),
    "selector in a schedule": (
        lambda rank: [GradualUnfreeze({0: "head", 1: ("backbone", "nowhere")[rank]})],
        "SelectorError: ",
    ),
    "selector of a fresh start": (
        lambda rank: [ReinitTopLayers(0, params=("head", "nowhere")[rank])],
        "SelectorError: ",
    ),
    "too many layers": (lambda rank: [ReinitTopLayers(1 + 8 * rank)], "ArgumentError: "),
    "callback": (
        lambda rank: [FreezeBackbone(), *[ReinitTopLayers(1)] * rank],
        "ConflictError: The ranks have other callbacks",
    ),
    "interval": (
        lambda rank: [FreezeBackbone(), TrainableParamAudit(every=("batch", "epoch")[rank])],
        "ConflictError: The ranks have other callbacks",
    ),
    "change": (breaks_switch, "Boom: sync broke"),
    "check": (breaks_check, "Boom: check broke"),
    "fresh start": (
        lambda rank: [breaks(ReinitTopLayers(1), "reinit_names", nth=2 if rank else 0)],
        "Boom: reinit_names broke",
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_failure_of_one_rank_ends_all_of_them() -> None:
    def act(rank: int) -> list[str]:
        return [error_of(make(rank)) for make, _ in FITS.values()]

    healthy, failing = on_ranks(act)
    assert [healthy.error, failing.error] == ["", ""]
    for name, told, raised in zip(FITS, healthy.value, failing.value):
        expected = FITS[name][1]
        assert raised.startswith(expected), (name, raised)
        if expected.startswith("ConflictError"):
            assert told == raised
        else:
            assert told == f"ConflictError: Rank 1 can't go on, so no rank does. {raised}", name


class StopsAlone(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 4 and trainer.global_rank == 1:
            trainer.should_stop = True


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_ranks_that_are_no_longer_in_step_end_together() -> None:
    def act(rank: int) -> str:
        return error_of([FreezeBackbone(), TrainableParamAudit(), StopsAlone()])

    for outcome in on_ranks(act):
        assert outcome.value.startswith("ConflictError: The ranks are no longer in step: ")


def error_of(callbacks: list[Any]) -> str:
    try:
        fit(lambda: OwnData(sgd), *callbacks, epochs=3)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.timeout(60)
def test_a_rank_that_fails_is_heard_wherever_the_others_are() -> None:
    def talk(rank: int, failing: dict[int, int]) -> str:
        try:
            with together():
                for turn in range(3):
                    if failing.get(rank) == turn:
                        raise Boom(f"turn {turn} of rank {rank}")
                    with together():
                        assert from_all_ranks(rank, "a turn") == [0, 1, 2]
        except Exception as error:
            return str(error)
        return "done"

    def act(rank: int) -> list[str]:
        dist.init_process_group("gloo", rank=rank, world_size=3)
        plans = [{}, {1: 0}, {2: 2}, {1: 1, 2: 1}, {0: 3 - 1, 1: 1}]
        told = [talk(rank, plan) for plan in plans]
        return [*told, str(from_all_ranks("still in step", "the end"))]

    outcomes = on_ranks(act, ranks=3)
    assert [outcome.error for outcome in outcomes] == [""] * 3
    heard = "Rank {0} can't go on, so no rank does. Boom: turn {1} of rank {0}"
    own = "turn {1} of rank {0}"
    assert [outcome.value for outcome in outcomes] == [
        ["done", heard.format(1, 0), heard.format(2, 2), heard.format(1, 1), heard.format(1, 1)]
        + [str(["still in step"] * 3)],
        ["done", own.format(1, 0), heard.format(2, 2), own.format(1, 1), own.format(1, 1)]
        + [str(["still in step"] * 3)],
        ["done", heard.format(1, 0), own.format(2, 2), own.format(2, 1), heard.format(1, 1)]
        + [str(["still in step"] * 3)],
    ]


def test_one_process_raises_what_it_raises() -> None:
    with pytest.raises(Boom, match="alone"), together():
        raise Boom("alone")
