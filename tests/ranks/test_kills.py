"""Ranks that are killed with SIGKILL, one or both: the others end, and the resume goes on."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_freeze import GradualUnfreeze, TrainableParamAudit
from tests.callbacks.test_oracle_resume import assert_equal
from tests.interruption.harness import outcome, quietly
from tests.interruption.processes import start_process
from tests.ranks.fits import OwnData, fit

RANKS, EPOCHS, STEPS = 2, 6, 24
WAIT = 10.0  # seconds that a rank waits for another that is alive but silent: the group's timeout


class ByStep(OwnData):
    """Takes its batch by the global step: a mid-epoch resume begins its loader anew."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batches = list(self.train_dataloader())
        return super().training_step(batches[self.global_step % len(batches)], batch_idx)


def configure(module: Any) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7)]


class Save(ModelCheckpoint):
    """Saves each step; an epoch's last at the epoch's end, as in tests/interruption/harness.py."""

    def on_train_batch_end(self, trainer: Trainer, *rest: Any, **named: Any) -> None:
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            super().on_train_batch_end(trainer, *rest, **named)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class Dies(Callback):
    """Kills or stops its own process at a step, in the hook that is drawn."""

    def __init__(self, step: int, hook: str, sign: int = signal.SIGKILL) -> None:
        def die(trainer: Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == step:
                os.kill(os.getpid(), sign)

        setattr(self, hook, die)


HOOKS = ("on_train_batch_start", "on_after_backward", "on_train_batch_end", "on_save_checkpoint")


def train(folder: Path, rank: int, port: int, dies: tuple[Callback, ...] = ()) -> None:
    """What one rank does."""
    quietly()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    freezing = GradualUnfreeze(start=3, every=5, unit="step", lr_decay=0.5)
    audit = TrainableParamAudit(table=False, report=folder / "report.json")
    save = Save(folder, save_last=True, save_top_k=0, every_n_train_steps=1)
    last = folder / "last.ckpt"
    made = fit(
        lambda: ByStep(configure),
        freezing,
        audit,
        *dies,
        save,
        strategy=DDPStrategy(timeout=timedelta(seconds=WAIT)),
        enable_checkpointing=True,
        epochs=EPOCHS,
        ckpt_path=last if last.exists() else None,
    )
    torch.save(outcome(made, made.lightning_module), folder / f"end-{rank}.pt")  # type: ignore[arg-type]


def on_two_ranks(folder: Path, dies: dict[int, Callback], seconds: float = 40) -> list[int]:
    """Exit statuses, minus the signal where one ended a rank."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    ranks = [
        start_process(train, folder, rank, port, tuple(cb for r, cb in dies.items() if r == rank))
        for rank in range(RANKS)
    ]
    deadline = time.monotonic() + seconds
    try:
        for process in ranks:
            process.join(max(deadline - time.monotonic(), 0))
        statuses = [process.exitcode for process in ranks]
        assert None not in statuses, f"a rank hangs: {statuses}"
        return statuses
    finally:
        for process in ranks:
            process.kill()


def saved_step(folder: Path) -> int:
    """The step of the last checkpoint; 0 where ranks died before the first."""
    path = folder / "last.ckpt"
    return int(torch.load(path, weights_only=True)["global_step"]) if path.exists() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank comes to that nothing interrupts."""
    if not hasattr(os, "fork"):
        pytest.skip("needs processes that fork")
    folder = tmp_path_factory.mktemp("whole")
    assert on_two_ranks(folder, {}) == [0, 0]
    ends = [torch.load(folder / f"end-{rank}.pt", weights_only=True) for rank in range(RANKS)]
    assert_equal(*ends)
    return ends


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(4))
def test_ranks_that_are_killed_end_and_go_on_exactly(
    tmp_path: Path, whole: list[Any], seed: int
) -> None:
    chance = random.Random(seed)
    first = chance.randint(1, 9)
    for step in (first, first + chance.randint(2, 10)):
        killed = chance.choice([[0], [1], [0, 1]])
        hook = chance.choice(HOOKS if killed == [0] else HOOKS[:-1])
        print(f"seed {seed}: kill ranks {killed} at step {step} in {hook}")
        before = time.monotonic()
        statuses = on_two_ranks(tmp_path, {rank: Dies(step, hook) for rank in killed})
        assert all(statuses[rank] == -signal.SIGKILL for rank in killed), statuses
        assert all(statuses), statuses  # the other one ended with an error
        # a closed connection is seen at once, long before the timeout
        assert time.monotonic() - before < WAIT + 15
        assert step - 1 <= saved_step(tmp_path) <= step
    assert saved_step(tmp_path) < STEPS  # control: they were cut short
    assert on_two_ranks(tmp_path, {}) == [0, 0]
    for rank in range(RANKS):
        ended = torch.load(tmp_path / f"end-{rank}.pt", weights_only=True)
        assert_equal(whole[rank], ended)
    assert list(tmp_path.rglob(".*.part")) == []
    assert saved_step(tmp_path) == STEPS


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_rank_that_stands_still_ends_the_other_at_the_timeout_of_the_group(
    tmp_path: Path, whole: list[Any]
) -> None:
    before = time.monotonic()
    stopped = Dies(5, "on_train_batch_start", signal.SIGSTOP)
    with pytest.raises(AssertionError, match=r"a rank hangs: \[[1-9], None\]"):
        on_two_ranks(tmp_path, {1: stopped}, seconds=WAIT + 8)
    assert time.monotonic() - before >= WAIT
    assert on_two_ranks(tmp_path, {}) == [0, 0]
    assert_equal(whole[0], torch.load(tmp_path / "end-0.pt", weights_only=True))
