"""Ranks move together: they decide on one value, compare their plans, and raise together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_freeze import FreezeBackbone, GradualUnfreeze, TrainableParamAudit
from lightning_freeze.engine.distributed import agree
from tests.catalogue.harness import Do
from tests.ranks.fits import EPOCHS, OwnData, fit, sgd
from tests.ranks.processes import Outcome, on_ranks
from tests.toys import trainable

# Decisions by a metric

# what each rank logs after each epoch; "better" is less than before
FALLS = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
RISES = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
SOARS = [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]


class Logs(OwnData):
    """Logs a number of its own on each rank, or on the first rank alone."""

    def __init__(self, values: tuple[list[float], ...], sync: bool, alone: bool) -> None:
        super().__init__(sgd)
        self.values, self.sync, self.alone = values, sync, alone

    def val_dataloader(self) -> Any:
        return self.train_dataloader()

    def number(self) -> torch.Tensor:
        return torch.tensor(self.values[self.global_rank][self.current_epoch])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.tell("number")
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.tell("val_number")

    def tell(self, name: str) -> None:
        if not self.alone:
            self.log(name, self.number(), on_step=False, on_epoch=True, sync_dist=self.sync)
        elif self.global_rank == 0:
            self.log(name, self.number(), on_step=False, on_epoch=True, rank_zero_only=True)


class Notes(Callback):
    """How many tensors train in each epoch."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if trainer.is_last_batch:
            self.sizes.append(len(trainable(module)))


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("monitor", ["val_number", "number"])
@pytest.mark.parametrize("how", ["each its own", "synced", "on the first rank alone"])
@pytest.mark.parametrize(("values", "moves"), [((FALLS, RISES), False), ((FALLS, SOARS), True)])
def test_a_metric_that_differs_between_ranks_moves_all_or_none(
    values: tuple[list[float], ...], moves: bool, how: str, monitor: str
) -> None:
    def act(_: int) -> Any:
        notes = Notes()
        unfreeze = GradualUnfreeze(monitor=monitor)
        audit = TrainableParamAudit(table=False)
        model = lambda: Logs(values, how == "synced", "alone" in how)  # noqa: E731
        fit(model, unfreeze, audit, notes, num_sanity_val_steps=1)
        return notes.sizes

    outcomes = on_ranks(act)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    first, second = (outcome.value for outcome in outcomes)
    assert first == second
    assert len(first) == EPOCHS
    # the mean of both falls or rises; where the first rank alone logs, its own falls
    assert (first[-1] > first[0]) is (moves and "alone" not in how)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("monitor", ["val_loss_of_mine", "loss_of_mine"])
def test_a_metric_that_no_rank_logs_is_missed_by_all(monitor: str) -> None:
    def act(_: int) -> None:
        model = lambda: Logs((FALLS, RISES), sync=False, alone=False)  # noqa: E731
        fit(model, GradualUnfreeze(monitor=monitor), num_sanity_val_steps=1)

    for outcome in on_ranks(act):
        assert outcome.error.startswith(f"ArgumentError: `monitor='{monitor}'`")


# Plans


def on_two(*callbacks: Any, model: Any = OwnData) -> list[Outcome]:
    """A fit with other callbacks on the second rank than on the first."""
    return on_ranks(lambda rank: fit(lambda: model(sgd), *callbacks[rank]) and None)


BOTTOM, TOP = "backbone.blocks.0", "backbone.blocks.3"


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("audited", [False, True])
def test_ranks_with_other_selectors_raise_together(audited: bool) -> None:
    def callbacks(selector: str) -> list[Callback]:
        audit = [TrainableParamAudit(table=False)] if audited else []
        return [FreezeBackbone(selector), *audit]

    outcomes = on_two(callbacks(BOTTOM), callbacks(TOP))
    assert outcomes[0] == outcomes[1]
    error = outcomes[0].error
    assert error.startswith("ConflictError: The ranks don't agree on what trains.")
    for place, text in (
        (BOTTOM, "stays frozen on rank 0, trains from the start on rank 1"),
        (TOP, "trains from the start on rank 0, stays frozen on rank 1"),
    ):
        names = f"`{place}.linear.weight`, `{place}.linear.bias`, `{place}.norm.weight`"
        assert f"{names} and 1 more: {text}." in error


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (
            lambda: [FreezeBackbone(unfreeze_at_epoch=1)],
            lambda: [FreezeBackbone(unfreeze_at_epoch=2)],
            "trains from epoch 1 on rank 0, trains from epoch 2 on rank 1",
        ),
        (
            lambda: [GradualUnfreeze(unit="step", start=2, every=2)],
            lambda: [GradualUnfreeze(unit="step", start=3, every=2)],
            "trains from step 2 on rank 0, trains from step 3 on rank 1",
        ),
        (
            lambda: [FreezeBackbone(lr_scale=0.5, unfreeze_at_epoch=1)],
            lambda: [FreezeBackbone(unfreeze_at_epoch=1)],
            "trains from epoch 1 at 0.5 of the rate on rank 0, trains from epoch 1 on rank 1",
        ),
        (
            lambda: [TrainableParamAudit(table=False)],
            lambda: [FreezeBackbone(), TrainableParamAudit(table=False)],
            "The ranks have other callbacks: TrainableParamAudit(every='epoch', "
            "on_violation='raise') on rank 0; FreezeBackbone(), TrainableParamAudit(",
        ),
    ],
)
def test_ranks_that_would_part_later_raise_before_the_first_batch(
    first: Any, second: Any, told: str
) -> None:
    outcomes = on_two(first(), second())
    assert outcomes[0] == outcomes[1]
    assert told in outcomes[0].error


class ByRank(FreezeBackbone):
    """One rank moves alone."""

    def stage(self, schedule: Any, epoch: int, step: int) -> int:
        return int(epoch >= 2 and torch.distributed.get_rank() == 1)


class Moves(GradualUnfreeze):
    """Both ranks move, but not to the same stage."""

    def stage(self, schedule: Any, epoch: int, step: int) -> int:
        return min(epoch * (1 + torch.distributed.get_rank()), 5)


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Moves(), "`backbone.blocks.2.linear.bias`, `backbone.blocks.2.linear.weight`, "),
        (lambda: ByRank(unfreeze_at_epoch=5), "`backbone.blocks.0.linear.bias`, "),
    ],
)
def test_ranks_that_part_on_the_way_raise_together(make: Any, names: str) -> None:
    outcomes = on_two([make()], [make()])
    assert outcomes[0] == outcomes[1]
    assert f"trains. {names}" in outcomes[0].error
    assert ": is frozen on rank 0, trains on rank 1. Give every rank" in outcomes[0].error


def test_one_process_agrees_with_itself() -> None:
    agree({"a": "is frozen"}, "trains")


# Violations


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("every", ["epoch", "batch"])
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_frozen_weight_that_one_rank_writes_ends_all_with_the_same_error(
    culprit: int, every: str, tmp_path: Path
) -> None:
    def act(rank: int) -> None:
        def write(_: Any, module: Any) -> None:
            if rank == culprit:
                module.backbone.embed.weight += 1

        audit = TrainableParamAudit(table=False, every=every, report=tmp_path / "report.json")
        fit(lambda: OwnData(sgd), FreezeBackbone(), Do(at=2, on_train_batch_end=write), audit)

    outcomes = on_ranks(act)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].error.startswith("FrozenWeightsChanged: ")
    # seen at the epoch's end, or at the end of the batch
    when = f"epoch 0, step {4 if every == 'epoch' else 2}, rank {culprit}"
    assert f"backbone.embed.weight changed although frozen ({when}" in outcomes[0].error
    assert (tmp_path / "report.json").is_file()
