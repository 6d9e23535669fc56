"""Replicas stay equal after every change of the trainable set, and equal to one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from lightning_freeze import GradualUnfreeze, ReinitTopLayers, TrainableParamAudit
from tests.ranks.fits import (
    EPOCHS,
    InHalves,
    Manual,
    OwnData,
    Save,
    WithoutLog,
    adamw,
    fit,
    saved,
    sgd,
)
from tests.ranks.processes import on_ranks
from tests.toys import same

OPTIMIZERS = {"sgd": (sgd, 1e-6), "adamw": (adamw, 1e-4)}


def ours(folder: Path) -> list[Callback]:
    audit = TrainableParamAudit(table=False)
    return [GradualUnfreeze(), ReinitTopLayers(1, seed=3), audit, Save(folder)]


class Wrapped(Callback):
    """Asserts at each batch what the model is wrapped in."""

    def __init__(self, **expected: bool) -> None:
        self.expected = {"find_unused_parameters": False, **expected}

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        wrapped = trainer.strategy.model
        assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
        assert {name: getattr(wrapped, name) for name in self.expected} == self.expected


class ByHandHook(Callback):
    """Registers a communication hook by hand, once."""

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        trainer.strategy.model.register_comm_hook(None, allreduce_hook)


@dataclass(frozen=True)
class Case:
    """A way to train on two ranks.

    Attributes:
        trainer: options of the Trainer.
        wrapping: options of DistributedDataParallel.
        kind: the module.
        hook: whether a communication hook is registered by hand.
        compiled: whether the module is compiled as a whole.
    """

    trainer: dict[str, Any] = field(default_factory=dict)
    wrapping: dict[str, bool] = field(default_factory=dict)
    kind: type[OwnData] = OwnData
    hook: bool = False
    compiled: bool = False

    def fit(self, folder: Path, configure: Any) -> None:
        """On this rank."""
        hooks: list[Callback] = [ByHandHook()] if self.hook else []
        fit(
            lambda: self.kind(configure),
            *hooks,
            *ours(folder),
            Wrapped(**self.wrapping),
            compiled=self.compiled,
            strategy=DDPStrategy(**self.wrapping),
            **self.trainer,
        )


ACCUMULATED = {"accumulate_grad_batches": 2}
VIEWS = {"gradient_as_bucket_view": True}
STATIC = {"static_graph": True}

# torch itself refuses a static graph with accumulation: its first backward pass must reduce
CASES = {
    "plain": Case(),
    "accumulation": Case(ACCUMULATED),
    "bucket views": Case(wrapping=VIEWS),
    "static graph": Case(wrapping=STATIC),
    "hook": Case(hook=True),
    "manual": Case(kind=Manual),
    "bf16-mixed": Case({"precision": "bf16-mixed"}),
    "compiled": Case(kind=WithoutLog, compiled=True),
    "views, static, hook": Case(wrapping=VIEWS | STATIC, hook=True),
    "views, accumulation, hook": Case(ACCUMULATED, VIEWS, hook=True),
    "views, static, hook, manual": Case(wrapping=VIEWS | STATIC, kind=Manual, hook=True),
    "views, bf16-mixed, hook": Case({"precision": "bf16-mixed"}, VIEWS, hook=True),
    "views, compiled, hook": Case(wrapping=VIEWS, kind=WithoutLog, hook=True, compiled=True),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: Any) -> Callable[[str, dict[str, Any]], Path]:
    """Folder of the fit in one process; one fit for all that do the same arithmetic."""
    folders: dict[Any, Path] = {}

    def reference(optimizer: str, options: dict[str, Any]) -> Path:
        key = (optimizer, *options.items())
        if key in folders:
            return folders[key]
        folder = folders[key] = tmp_path_factory.mktemp("alone")
        # bfloat16 rounds a whole batch otherwise than its halves
        halves = ACCUMULATED if "precision" in options else {}
        kind = InHalves if halves else OwnData

        def act(_: int) -> None:
            make = lambda: kind(OPTIMIZERS[optimizer][0])  # noqa: E731
            fit(make, *ours(folder), ranks=1, **options, **halves)

        (outcome,) = on_ranks(act, ranks=1)
        assert not outcome.error
        return folder

    return reference


def largest_differences(folder: Path, other: Path) -> list[float]:
    """Between rank 0 of two fits, after each epoch."""
    found = []
    for epoch in range(EPOCHS):
        a, b = saved(folder, 0, epoch), saved(other, 0, epoch)
        assert a.keys() == b.keys()
        found.append(max(float((a[name] - b[name]).abs().max()) for name in a))
    return found


def differing(folder: Path, epoch: int) -> set[str]:
    a, b = saved(folder, 0, epoch), saved(folder, 1, epoch)
    assert a.keys() == b.keys()
    return {name for name in a if not same(a[name], b[name])}


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_stay_equal_and_equal_to_one_process(
    case: str, optimizer: str, tmp_path: Path, alone: Any
) -> None:
    configure, tolerance = OPTIMIZERS[optimizer]
    outcomes = on_ranks(lambda _: CASES[case].fit(tmp_path, configure))
    assert [outcome.error for outcome in outcomes] == ["", ""]
    assert [differing(tmp_path, epoch) for epoch in range(EPOCHS)] == [set()] * EPOCHS
    apart = max(largest_differences(tmp_path, alone(optimizer, CASES[case].trainer)))
    print(f"\n{case}, {optimizer}: {apart:.1e}")  # shown by `pytest -s`
    assert apart <= tolerance
    first, last = saved(tmp_path, 0, 0), saved(tmp_path, 0, EPOCHS - 1)
    assert not [name for name in first if same(first[name], last[name])]


def launched(start_method: str, folder: Path) -> None:
    options: dict[str, Any] = {"strategy": start_method}
    audit = TrainableParamAudit(table=False, report=folder / "report.json")
    fit(Configured, *ours(folder)[:2], audit, Save(folder), **options)


class Configured(OwnData):
    """Can be pickled, for a process that is spawned."""

    def __init__(self) -> None:
        super().__init__(sgd)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("start_method", ["ddp_fork", "ddp_spawn"])
def test_processes_that_the_trainer_starts_stay_equal_too(
    start_method: str, tmp_path: Path, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what conftest.py does for every test has to be done in a spawned process, too
    (tmp_path / "sitecustomize.py").write_text("import tests.conftest")
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(root)]))
    launched(start_method, tmp_path)
    assert [differing(tmp_path, epoch) for epoch in range(EPOCHS)] == [set()] * EPOCHS
    assert max(largest_differences(tmp_path, alone("sgd", {}))) <= 1e-6
    assert (tmp_path / "report.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_control_lightnings_backbone_finetuning_lets_the_ranks_drift_apart(
    optimizer: str, tmp_path: Path
) -> None:
    made = OPTIMIZERS[optimizer][0]

    def configure(module: torch.nn.Module) -> Any:
        optimizer = made(module)
        optimizer.param_groups[0]["params"] = [p for p in module.parameters() if p.requires_grad]
        return optimizer

    def act(_: int) -> None:
        unfreeze = BackboneFinetuning(1, lambda_func=lambda epoch: 1.0)
        fit(lambda: OwnData(configure), unfreeze, Save(tmp_path))

    assert [outcome.error for outcome in on_ranks(act)] == ["", ""]
    apart = [differing(tmp_path, epoch) for epoch in range(EPOCHS)]
    assert apart[0] == set()
    backbone = {name for name in saved(tmp_path, 0, 0) if name.startswith("backbone.")}
    assert all(names >= backbone for names in apart[1:])
