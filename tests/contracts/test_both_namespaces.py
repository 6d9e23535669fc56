"""`import lightning.pytorch` and `import pytorch_lightning`: the callbacks are the same in both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import lightning_utilities.core.rank_zero as shared
import pytest
import torch
from torch import nn

from lightning_freeze import (
    ConflictError,
    FreezeBackbone,
    FrozenFeatureCache,
    GradualFreeze,
    GradualUnfreeze,
    ReinitTopLayers,
    TrainableParamAudit,
)
from tests.ranks.processes import on_ranks
from tests.toys import Backbone, changed, loader, state

OURS: list[type] = [
    FreezeBackbone,
    FrozenFeatureCache,
    GradualFreeze,
    GradualUnfreeze,
    ReinitTopLayers,
    TrainableParamAudit,
]
NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
ORDERS = ("theirs first", "ours first")
WAYS = ("fit", "resume", "alone", "pickled", "copied", "class path", "short name")
EMBED = {"backbone.embed.weight", "backbone.embed.bias"}
BLOCKS = [{f"backbone.blocks.{n}.weight", f"backbone.blocks.{n}.bias"} for n in range(3)]
HEAD = {"head.weight", "head.bias"}
EVERYTHING = EMBED.union(*BLOCKS, HEAD)
# what trains at the end of three epochs, and what has moved by then
ENDS = {
    "FreezeBackbone": (HEAD | BLOCKS[2], HEAD | BLOCKS[2]),
    "GradualUnfreeze": (HEAD | BLOCKS[1] | BLOCKS[2], HEAD | BLOCKS[1] | BLOCKS[2]),
    "GradualFreeze": (EVERYTHING - EMBED, EVERYTHING),
    "ReinitTopLayers": (EVERYTHING, EVERYTHING),
    "TrainableParamAudit": (HEAD | BLOCKS[2], HEAD | BLOCKS[2]),
    "FrozenFeatureCache": (HEAD | BLOCKS[2], HEAD | BLOCKS[2]),
}

# One process for each namespace, in which the other one must not be loaded


def program(namespace: str, order: str, folder: Path, **more: str) -> Any:
    given = {"NAMESPACE": namespace, "ORDER": order, "FOLDER": str(folder), **more}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.contracts.namespaces"],
        env={**os.environ, **given},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("RESULT")[2])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("namespaces")
    first, second = folder / "lightning", folder / "pytorch_lightning"
    return {
        "lightning.pytorch": program("lightning.pytorch", "theirs first", first),
        "pytorch_lightning": program("pytorch_lightning", "ours first", second, OTHER=str(first)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_program_loads_no_other_namespace_than_its_own(
    results: dict[str, Any], namespace: str
) -> None:
    assert results[namespace]["loaded"] == [namespace.partition(".")[0]]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", ENDS)
def test_a_callback_does_its_work_in_either_namespace(
    results: dict[str, Any], name: str, namespace: str, way: str
) -> None:
    found = results[namespace]["rows"][name][way]
    trains, moved = ENDS[name]
    if way == "alone" and name in ("TrainableParamAudit", "FrozenFeatureCache"):
        trains = moved = EVERYTHING  # nothing freezes
    assert set(found["trains"]) == trains
    assert set(found["moved"]) == moved
    assert found["findings"] == []
    assert found["state"] == results["lightning.pytorch"]["rows"][name][way]["state"]
    if way != "alone":
        assert found["state"] == results["lightning.pytorch"]["rows"][name]["fit"]["state"]
    if name == "FrozenFeatureCache" and way == "fit":
        assert found["hits"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_a_checkpoint_of_one_namespace_is_resumed_in_the_other(
    results: dict[str, Any], name: str
) -> None:
    rows = results["pytorch_lightning"]["rows"][name]
    assert rows["resume from the other"] == rows["resume"]


@pytest.mark.slow
@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", ENDS)
def test_a_validation_freezes_nothing_and_checkpoints_are_saved_last(
    results: dict[str, Any], name: str, namespace: str
) -> None:
    found = results[namespace]["rows"][name]
    assert set(found["validate"]["trains"]) == EVERYTHING
    metrics = results["lightning.pytorch"]["rows"][name]["validate"]["metrics"]
    assert found["validate"]["metrics"] == metrics
    assert metrics[0]["val_loss"] > 0
    assert found["last"] == "ModelCheckpoint"


@pytest.mark.slow
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_configured_callbacks_stoppers_and_spawned_ranks_work_in_either_namespace(
    results: dict[str, Any], namespace: str
) -> None:
    found = results[namespace]["others"]
    assert found == results["lightning.pytorch"]["others"]
    assert set(found["configure_callbacks"]["moved"]) == HEAD | BLOCKS[2]
    assert set(found["EarlyStopping"]["moved"]) == HEAD | BLOCKS[2]
    assert found["EarlyStopping"]["epochs"] == 2
    assert set(found["ddp_spawn"]["moved"]) == HEAD | BLOCKS[1] | BLOCKS[2]


NAMED = """
import sys
import tests.conftest
def ours():
    import lightning_freeze.callbacks
def theirs():
    import {namespace}
{first}()
{second}()
import lightning_freeze as lf
from {namespace} import Callback
from jsonargparse._typehints import resolve_class_path_by_name as by_name
for name in lf._CALLBACKS:
    assert issubclass(getattr(lf, name), Callback), name
    assert by_name(Callback, name) == f"lightning_freeze.{{name}}", by_name(Callback, name)
print([n for n in ("lightning", "pytorch_lightning") if n in sys.modules])
"""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_whichever_is_imported_first_the_callbacks_are_lightnings_and_have_short_names(
    namespace: str, order: str
) -> None:
    first, second = ("theirs", "ours") if order == "theirs first" else ("ours", "theirs")
    code = NAMED.format(namespace=namespace, first=first, second=second)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([namespace.partition(".")[0]])


# Both in one process


@pytest.fixture(scope="module")
def namespaces() -> dict[str, Any]:
    before = shared.log  # each takes it over when it is imported
    import pytorch_lightning
    import pytorch_lightning.callbacks
    import pytorch_lightning.strategies

    shared.log = before
    return {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": pytorch_lightning}


def net(pl: ModuleType) -> Any:
    class Net(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = Backbone(), nn.Linear(8, 3)

        def forward(self, x: Any) -> Any:
            return self.head(self.backbone(x))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    return Net()


def trainer(pl: ModuleType, callbacks: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    given = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "max_epochs": 2}
    return pl.Trainer(callbacks=callbacks, **{**quiet, **given, **options})


def heads_alone(found: set[str]) -> bool:
    return bool(found) and all(name.startswith("head.") for name in found)


@pytest.mark.parametrize("name", NAMESPACES)
def test_where_both_are_loaded_the_callbacks_work_with_a_trainer_of_either(
    namespaces: dict[str, Any], name: str
) -> None:
    pl = namespaces[name]
    assert all(issubclass(kind, pl.Callback) for kind in OURS for pl in namespaces.values())
    model, audit = net(pl), TrainableParamAudit(table=False)
    before = state(model)
    trainer(pl, [FreezeBackbone(), audit]).fit(model, loader())
    assert audit.findings == []
    assert heads_alone(changed(before, state(model)))


PAIRS = [NAMESPACES, NAMESPACES[::-1]]


@pytest.mark.parametrize("kind", ["ModelCheckpoint", "EarlyStopping"])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("make", [FreezeBackbone, TrainableParamAudit, lambda: ReinitTopLayers(1)])
def test_what_has_to_come_last_and_is_of_the_other_namespace_is_refused_with_the_import_to_write(
    namespaces: dict[str, Any], ours: str, theirs: str, kind: str, make: Callable[[], Any]
) -> None:
    foreign = getattr(namespaces[theirs].callbacks, kind)
    own = type("Own", (foreign,), {"__module__": "theirs"})
    for made in (foreign, own):
        callback = made(monitor="val_loss") if kind == "EarlyStopping" else made()
        run, model = trainer(namespaces[ours], [make(), callback]), net(namespaces[ours])
        before = state(model)
        with pytest.raises(ConflictError, match=f"from {ours}.callbacks import {made.__name__}"):
            run.fit(model, loader(), loader())
        assert changed(before, state(model)) == set()


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_any_other_callback_of_the_other_namespace_runs_beside_ours(
    namespaces: dict[str, Any], ours: str, theirs: str
) -> None:
    class Counts(namespaces[theirs].Callback):  # type: ignore[misc, name-defined]
        batches = 0

        def on_train_batch_end(self, *_: Any) -> None:
            self.batches += 1

    counts, model = Counts(), net(namespaces[ours])
    before = state(model)
    trainer(namespaces[ours], [counts, FreezeBackbone()]).fit(model, loader())
    assert counts.batches == 8
    assert heads_alone(changed(before, state(model)))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_module_of_the_other_namespace_is_refused_by_lightning_and_stays_as_it_was(
    namespaces: dict[str, Any], ours: str, theirs: str
) -> None:
    model = net(namespaces[theirs])
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        trainer(namespaces[ours], [FreezeBackbone()]).fit(model, loader())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", NAMESPACES)
def test_the_user_of_a_hook_is_named_and_the_library_is_not(
    namespaces: dict[str, Any], name: str
) -> None:
    pl = namespaces[name]

    class Writes(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            with torch.no_grad():
                pl_module.backbone.embed.weight.add_(1.0)

    audit = TrainableParamAudit(on_violation="warn", table=False)
    timer = pl.callbacks.Timer(duration="00:01:00:00")
    with pytest.warns(UserWarning, match="frozen-changed"):
        trainer(pl, [FreezeBackbone(), audit, Writes(), timer]).fit(net(pl), loader())
    told = next(finding for finding in audit.findings if finding.code == "frozen-changed")
    said = f"{told.message} {told.cause} {told.fix}"
    assert "Writes.on_train_epoch_end" in said
    assert "Timer" not in said


# Two ranks


def on_two_ranks(pl: Any, folder: Path, sharded: bool) -> list[Any]:
    """On each rank: the weights before, after two epochs, and resumed after the first."""
    from torch.distributed.fsdp import fully_shard

    class Net(type(net(pl))):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.backbone = nn.Sequential()
            self.backbone.embed = nn.Linear(4, 8)
            self.backbone.blocks = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

        def configure_model(self) -> None:
            if sharded:
                for block in self.backbone.blocks:
                    fully_shard(block, mesh=self.device_mesh["data_parallel"])
                fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def whole(model: Any) -> dict[str, Any]:
        tensors = model.state_dict().items()
        return {n: (t.full_tensor() if sharded else t).tolist() for n, t in tensors}

    def act(rank: int) -> Any:
        torch.set_num_threads(1)
        found = [{name: value.tolist() for name, value in Net().state_dict().items()}]
        for path, written in ((None, folder), (folder / "epoch=0.ckpt", folder / "again")):
            save = pl.callbacks.ModelCheckpoint(written, "{epoch}", save_top_k=-1)
            callbacks = [GradualUnfreeze(), TrainableParamAudit(table=False, certificate=False)]
            strategy = pl.strategies.ModelParallelStrategy(2, 1) if sharded else "ddp"
            options = {"strategy": strategy, "devices": 2, "enable_checkpointing": True}
            model = Net()
            trainer(pl, [*callbacks, save], **options).fit(model, loader(), ckpt_path=path)
            found.append(whole(model))
        return found

    outcomes = on_ranks(act, seconds=120)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    return [outcome.value for outcome in outcomes]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_ranks_of_either_namespace_end_alike_and_resume(
    namespaces: dict[str, Any], tmp_path: Path, sharded: bool
) -> None:
    ends = [on_two_ranks(pl, tmp_path / name, sharded) for name, pl in namespaces.items()]
    assert ends[0] == ends[1]
    for before, straight, resumed in ends[0]:
        assert straight == resumed
        moved = {name for name in before if before[name] != straight[name]}
        assert moved == HEAD | BLOCKS[1]  # the top block is the second stage's
