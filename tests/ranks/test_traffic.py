"""What is reduced across ranks: at each stage the gradients of what trains, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from lightning_freeze import FreezeBackbone, GradualFreeze, GradualUnfreeze, TrainableParamAudit
from tests.ranks.fits import EPOCHS, OwnData, Save, adamw, fit, saved, sgd
from tests.ranks.processes import on_ranks
from tests.toys import same

STEPS = 4


def count(reduced, bucket):  # torch reads the annotations of hooks, and takes no strings
    """A communication hook that adds up what it reduces."""
    reduced[-1] += bucket.buffer().numel() * bucket.buffer().element_size()
    return allreduce_hook(None, bucket)


class Meter(Callback):
    """Bytes of each step, reduced and trainable, with a hook that is registered only once."""

    def __init__(self, *, registers: bool = True) -> None:
        self.registers = registers
        self.reduced: list[int] = []
        self.trainable: list[int] = []

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        if self.registers:
            trainer.strategy.model.register_comm_hook(self.reduced, count)

    def on_train_batch_start(self, trainer: Trainer, module: Any, *_: Any) -> None:
        self.reduced.append(0)
        trains = [p for p in module.parameters() if p.requires_grad]
        self.trainable.append(sum(p.numel() * p.element_size() for p in trains))


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}])
@pytest.mark.parametrize(
    ("make", "stages"), [(GradualUnfreeze, 6), (lambda: FreezeBackbone(unfreeze_at_epoch=2), 2)]
)
def test_bytes_reduced_are_those_of_what_trains(
    make: Any, stages: int, options: dict[str, Any]
) -> None:
    def act(_: int) -> Any:
        meter = Meter()
        audit = TrainableParamAudit(table=False)
        fit(lambda: OwnData(sgd), make(), audit, meter, strategy=DDPStrategy(**options))
        return meter.reduced, meter.trainable

    for outcome in on_ranks(act):
        assert not outcome.error
        reduced, trainable = outcome.value
        assert reduced == trainable
        assert len(reduced) == STEPS * EPOCHS
        assert reduced[0] == (8 * 3 + 3) * 4  # the head
        assert len(set(reduced)) == stages


@pytest.mark.timeout(60)
def test_what_freezes_is_no_longer_reduced_and_ranks_stay_equal(tmp_path: Path) -> None:
    def act(_: int) -> Any:
        meter, audit = Meter(), TrainableParamAudit(table=False, every="batch")
        callback = GradualFreeze.autofreeze(every=5, unit="step", percentile=80)
        fit(lambda: OwnData(sgd), callback, audit, meter, Save(tmp_path))
        decided = callback.state_dict()["gradient"]
        return meter.reduced, meter.trainable, decided, len(audit.findings)

    first, second = on_ranks(act)
    assert (first.error, second.error) == ("", "")
    assert first.value == second.value
    reduced, trainable, decided, findings = first.value
    assert findings == 0
    assert reduced == trainable
    assert len(reduced) == STEPS * EPOCHS
    assert 0 < decided["frozen"] < 5
    assert reduced[-1] < reduced[0]
    a, b = saved(tmp_path, 0, EPOCHS - 1), saved(tmp_path, 1, EPOCHS - 1)
    assert all(same(a[name], b[name]) for name in a)


class Registers(DDPStrategy):
    """Registers a hook whenever it wraps, as Lightning does on GPUs with `ddp_comm_hook`."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def configure_ddp(self) -> None:
        super().configure_ddp()
        self.model.register_comm_hook(self.meter.reduced, count)


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_hook_that_the_strategy_registers_isnt_registered_twice() -> None:
    def act(_: int) -> Any:
        meter = Meter(registers=False)
        fit(lambda: OwnData(sgd), GradualUnfreeze(), meter, strategy=Registers(meter))
        return meter.reduced == meter.trainable

    assert [(outcome.value, outcome.error) for outcome in on_ranks(act)] == [(True, "")] * 2


class Compresses(Callback):
    """A hook that remembers matrices in the shapes of the buckets that it has seen."""

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        state = PowerSGDState(
            None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=1
        )
        trainer.strategy.model.register_comm_hook(state, powerSGD_hook)


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_hook_that_remembers_buckets_survives_their_change(tmp_path: Path) -> None:
    def act(_: int) -> None:
        callbacks = [GradualUnfreeze(), TrainableParamAudit(table=False), Save(tmp_path)]
        fit(lambda: OwnData(adamw), Compresses(), *callbacks)

    assert [outcome.error for outcome in on_ranks(act)] == ["", ""]
    for epoch in range(EPOCHS):
        a, b = saved(tmp_path, 0, epoch), saved(tmp_path, 1, epoch)
        assert all(same(a[name], b[name]) for name in a)
