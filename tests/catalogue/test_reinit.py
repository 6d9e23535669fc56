"""A fresh start: weights that are random again unasked, or not fresh although asked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import (
    FreezeBackbone,
    ReinitError,
    ReinitTopLayers,
    TrainableParamAudit,
    reinit,
)
from lightning_freeze.cli import main
from tests.catalogue.harness import Do, audited, one, row
from tests.toys import Toy, changed, loader, same, seeded, state, trainer
from tests.zoo import tiny_bert


class Snapshot(Do):
    """Keeps the weights as they are when the first batch is due."""

    def __init__(self) -> None:
        super().__init__(on_train_start=lambda _, module: self.weights.update(state(module)))
        self.weights: dict[str, Tensor] = {}


class PlainConfig(transformers.PretrainedConfig):
    """Of a model that isn't part of transformers."""

    model_type = "plain"

    def __init__(self, bias: bool = False, **others: Any) -> None:
        self.bias = bias
        super().__init__(**others)


class Plain(transformers.PreTrainedModel):
    """A user's own model, which initialises itself in the old way: through `.data`."""

    config_class = PlainConfig
    base_model_prefix = "model"

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(4, 8, bias=config.bias)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


class OnPlain(Toy):
    """A head on a loaded backbone."""

    def __init__(self, backbone: Plain) -> None:
        super().__init__()
        self.backbone = backbone


@row("I1", told="`lightning-freeze verify` compares a run with the weights that it began from")
def test_i1_loaded_weights_that_are_random_again_are_told_from_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(tmp_path / "pretrained")
    saved = Plain(PlainConfig())
    saved.save_pretrained(base)

    def run(bias: bool) -> tuple[bool, int, int]:
        # a bias that the file lacks has its whole layer initialised once more
        loaded = Plain.from_pretrained(base, bias=bias)
        kept = same(loaded.linear.weight, saved.linear.weight)
        checkpoint, audit = str(tmp_path / f"{bias}.ckpt"), TrainableParamAudit(table=False)
        fit = trainer(FreezeBackbone("backbone"), audit, epochs=1)
        fit.fit(OnPlain(loaded), loader())
        assert audit.findings == []  # it was random before the fit, and stayed as it was
        fit.save_checkpoint(checkpoint)
        certified = main(["verify", base, checkpoint, "--certificate", checkpoint])
        return kept, main(["verify", base, checkpoint, "--no-certificate"]), certified

    assert run(bias=True) == (False, 1, 1)
    assert "not as in BASE: 1 tensor in backbone" in capsys.readouterr().out
    assert run(bias=False) == (True, 0, 0)  # control
    assert "identical: the one tensor that both have" in capsys.readouterr().out


class Scale(nn.Module):
    """A bare parameter, of which no init function of BERT's knows."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(16))


class Extended(transformers.BertModel):
    """A BERT with layers of a user's own."""

    def __init__(self, config: transformers.BertConfig) -> None:
        super().__init__(config)
        self.scale = Scale()
        self.adapter = nn.Linear(16, 16)
        nn.init.eye_(self.adapter.weight)
        self.post_init()


class Text(LightningModule):
    """A pretrained transformers model and a head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(16, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features = self.model(input_ids=batch[0]).last_hidden_state[:, 0]
        if isinstance(self.model, Extended):
            features = self.model.adapter(features) * self.model.scale.gamma
        return nn.functional.cross_entropy(self.head(features), batch[0][:, 0] % 2)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def words() -> DataLoader[Any]:
    tokens = torch.randint(0, 50, (8, 6), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(tokens), batch_size=4)


def pretrained(folder: Path, kind: Any = transformers.BertModel) -> Any:
    """Loaded weights, far from what an init function gives."""
    bert = tiny_bert(2).bert
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.fill_(0.5).add_(torch.randn_like(parameter), alpha=0.1)
    bert.save_pretrained(folder)
    return kind.from_pretrained(folder)


def identity(name: str, parameter: nn.Parameter) -> None:
    nn.init.eye_(parameter)


@row("I2", prevented="`init` writes last, after whatever the model's making and loading wrote")
def test_i2_an_init_of_ones_own_has_the_last_word(tmp_path: Path) -> None:
    name = "model.adapter.weight"
    for make in (lambda: Extended(tiny_bert(2).config), lambda: pretrained(tmp_path, Extended)):
        model = Text(make())
        model.model.scale.gamma.data.fill_(1.0)
        written = torch.eye(16)
        assert not torch.equal(model.model.adapter.weight, written)  # the failure: post_init did it
        seen = Snapshot()
        callback = ReinitTopLayers(params=name, init=identity)
        assert audited(model, callback, seen, data=words()).findings == []
        assert torch.equal(seen.weights[name], written)
        assert not torch.equal(model.model.adapter.weight, written)  # and it trains from there


@row("I3", told="an error before the fit names what the model's own init doesn't write")
def test_i3_a_layer_that_no_init_function_writes_is_an_error(tmp_path: Path) -> None:
    model = Text(pretrained(tmp_path, Extended))
    # the failure: it was absent from the file, and is now whatever was in memory, zeros mostly
    assert not torch.equal(model.model.scale.gamma, torch.ones(16))
    before = state(model)
    both = ReinitTopLayers(params=["model.scale", "model.adapter"])
    with pytest.raises(ReinitError, match=r"own init doesn't write `model.scale.gamma` \(in a Sc"):
        trainer(both, epochs=1).fit(model, words())
    assert not changed(before, state(model))
    seen = Snapshot()  # control
    ones = ReinitTopLayers(params="model.scale", init=lambda name, p: nn.init.ones_(p))
    both = ReinitTopLayers(params="model.adapter")
    assert audited(model, ones, both, seen, data=words()).findings == []
    assert torch.equal(seen.weights["model.scale.gamma"], torch.ones(16))
    assert seen.weights["model.adapter.weight"].std() > 0.01


class Tied(LightningModule):
    """A language model whose head is its embedding."""

    def __init__(self, *, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 12, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = self.head(self.backbone(self.embed(batch[0])))
        return nn.functional.cross_entropy(scores, batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def tokens() -> DataLoader[Any]:
    drawn = torch.randint(0, 12, (16,), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(drawn), batch_size=4)


class FromMeta(Tied):
    """It is given memory and values late, layer by layer."""

    tie_again = False

    def configure_model(self) -> None:
        if self.embed.weight.is_meta:
            self.to_empty(device="cpu")
            for part in (self.embed, self.backbone[0], self.head):
                part.reset_parameters()
            if self.tie_again:
                self.head.weight = self.embed.weight


@row("I5", found="tie-split")
def test_i5_a_tie_that_the_way_from_the_meta_device_broke_is_named() -> None:
    for callbacks in ((), (FreezeBackbone("backbone"),)):
        with torch.device("meta"):
            model = FromMeta()
        assert model.head.weight is model.embed.weight
        audit = audited(model, *callbacks, data=tokens())
        assert model.head.weight is not model.embed.weight  # the failure: `to_empty` parts them
        finding = one(audit, "tie-split")
        assert set(finding.names) == {"embed.weight", "head.weight"}
        with torch.device("meta"):  # control
            model = FromMeta()
        model.tie_again = True
        assert audited(model, *callbacks, data=tokens()).findings == []
        assert model.head.weight is model.embed.weight


class Sharded(Tied):
    """Each rank makes a model of its own, and FSDP2 shards it layer by layer."""

    def configure_model(self) -> None:
        for part in (self.embed, self.backbone, self.head, self):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def _rank(rank: int, port: int, path: Path, how: dict[str, Any], callbacks: list[Any]) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.manual_seed(how.get("seed", rank))
    model = Sharded(tie=how.get("tie", False))
    if how.get("by_hand"):
        model.backbone.requires_grad_(False).eval()
    seen: dict[str, Any] = {"made": model.head.weight.detach().clone(), "findings": []}

    def look(_: Any, module: Any) -> None:
        seen["shard"] = module.head.weight.to_local().detach().clone()
        seen["head"] = module.head.weight.full_tensor().detach().clone()
        seen["tied"] = module.head.weight is module.embed.weight

    strategy: Any = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    options: dict[str, Any] = {"devices": 2, "use_distributed_sampler": False}
    run = trainer(*callbacks, Do(on_train_start=look), epochs=1, strategy=strategy, **options)
    run.fit(model, tokens())
    for callback in callbacks:
        seen["findings"] += getattr(callback, "findings", ())
    torch.save(seen, path / f"{rank}.pt")


def sharded(path: Path, *callbacks: Any, **how: Any) -> list[dict[str, Any]]:
    """What each of two ranks saw under FSDP2, with a seed of its own unless `seed` is given."""
    torch.multiprocessing.start_processes(
        _rank,
        (find_free_network_port(), path, how, list(callbacks)),
        nprocs=2,
        start_method="fork",
    )
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")
@row("I9", found="rank-mismatch")
def test_i9_what_is_frozen_in_parts_of_different_models_is_named(tmp_path: Path) -> None:
    first, second = sharded(tmp_path)
    assert not torch.equal(first["made"], second["made"])
    assert torch.equal(first["shard"], first["made"][:6])
    assert torch.equal(second["shard"], second["made"][6:])  # the failure: half of another model
    for freezing in ([FreezeBackbone("backbone")], []):
        watching = TrainableParamAudit(table=False, on_violation="warn")
        by_hand = not freezing
        for seen in sharded(tmp_path, *freezing, watching, by_hand=by_hand):
            assert [(f.code, f.names) for f in seen["findings"]] == [
                ("rank-mismatch", ("backbone.0.bias", "backbone.0.weight"))
            ]
        for seen in sharded(tmp_path, *freezing, watching, by_hand=by_hand, seed=3):  # control
            assert seen["findings"] == []
    one = [seen["head"] for seen in sharded(tmp_path, ReinitTopLayers(params="head", seed=3))]
    assert torch.equal(*one)  # drawn alike on every rank, although the ranks made it differently


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("freezing", [(FreezeBackbone("backbone"),), ()])
def test_a_tie_that_fsdp2_broke_is_named(tmp_path: Path, freezing: Any) -> None:
    watching = TrainableParamAudit(table=False, on_violation="warn")
    for seen in sharded(tmp_path, *freezing, watching, tie=True, seed=3):
        assert not seen["tied"]
        assert {finding.code for finding in seen["findings"]} == {"tie-split"}


@row("I6", prevented="the model's own init is used, which knows its norms")
def test_i6_layer_norms_of_a_fresh_layer_are_ones_and_zeros(tmp_path: Path) -> None:
    model = Text(pretrained(tmp_path))
    before, seen = state(model), Snapshot()
    assert audited(model, ReinitTopLayers(1), seen, data=words()).findings == []
    norms = [name for name in before if ".LayerNorm." in name and ".layer." in name]
    top = [name for name in norms if "layer.1." in name]
    assert len(top) == 4 and len(norms) == 8
    for name in norms:
        fresh = torch.ones(16) if name.endswith("weight") else torch.zeros(16)
        assert torch.equal(seen.weights[name], fresh) == (name in top), name
        assert same(seen.weights[name], before[name]) == (name not in top), name


def constant_init(module: Any, value: float) -> None:
    """A helper as many libraries have one: what it doesn't know it passes by in silence."""
    if hasattr(module, "weight") and module.weight is not None:
        nn.init.constant_(module.weight, value)


@row("I7", told="an error before the fit: re-initialising changed nothing")
def test_i7_an_init_helper_that_writes_nothing_is_an_error() -> None:
    helpers = (
        lambda name, p: constant_init(p, 0.1),  # a Parameter has no `weight`
        lambda name, p: torch.randn_like(p),  # makes a tensor, and drops it
    )
    for helper in helpers:
        model = seeded(Toy)
        before = state(model)
        run = trainer(ReinitTopLayers(params="head", init=helper), epochs=1)
        with pytest.raises(ReinitError, match=r"changed nothing: .* \(head.weight, head.bias"):
            run.fit(model, loader())
        assert not changed(before, state(model))
    seen = Snapshot()  # control
    writes = ReinitTopLayers(params="head", init=lambda name, p: nn.init.constant_(p, 0.1))
    assert audited(seeded(Toy), writes, seen).findings == []
    assert torch.equal(seen.weights["head.weight"], torch.full((3, 8), 0.1))


class Late(Toy):
    """Its head exists from `configure_model` on, so that it starts anew after the wrap."""

    def __init__(self) -> None:
        super().__init__()
        del self.head
        for block in self.backbone.blocks:
            block.norm = nn.LayerNorm(8)

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            self.head = nn.Linear(8, 3)


@pytest.mark.slow
@pytest.mark.timeout(120)
@row("I8", prevented="rank 0's seed is drawn for all ranks")
def test_i8_ranks_with_seeds_of_their_own_start_with_the_same_values(tmp_path: Path) -> None:
    def heads(callback: Any) -> tuple[list[Tensor], str]:
        own = Do(on_fit_start=lambda trainer, _: torch.manual_seed(trainer.global_rank))

        def keep(trainer: Any, module: Any) -> None:
            torch.save(module.head.weight.detach(), tmp_path / f"{trainer.global_rank}.pt")

        audited(
            seeded(Late),
            own,
            callback,
            Do(on_train_start=keep),
            epochs=1,
            strategy="ddp_fork",
            devices=2,
            use_distributed_sampler=False,
            audit={"report": tmp_path / "report.json"},
        )
        weights = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
        return weights, (tmp_path / "report.json").read_text()

    (first, second), report = heads(ReinitTopLayers(params="head"))
    assert same(first, second)
    assert '"findings": []' in report
    untouched, report = heads(Do())
    assert '"findings": []' in report
    assert not torch.equal(untouched[0], first)  # it did start anew
    # the failure: the same, by hand
    (first, second), report = heads(Do(on_fit_start=lambda _, module: reinit(module, "head")))
    assert not torch.equal(first, second)
    assert '"code": "rank-mismatch"' in report
    assert "head.weight, head.bias differ between rank 0 and rank 1" in report


@row("I11", prevented="it comes before the optimizer is made, and clears one that is kept")
def test_i11_a_fresh_layer_has_no_moments() -> None:
    steps: list[float] = []

    def note(trainer: Any, module: Any) -> None:
        moments = trainer.optimizers[0].state.get(module.head.weight, {})
        steps.append(float(moments.get("step", 0.0)))

    by_hand = Do(at=4, on_train_epoch_start=lambda _, module: reinit(module, "head"))
    audited(seeded(Toy), by_hand, Do(at=4, on_train_batch_start=note))
    assert steps == [4.0]  # the failure: fresh values, with the moments of the old ones
    # a module that keeps its optimizer from one fit to the next
    kept: dict[str, Any] = {}

    def once(module: Any) -> Any:
        return kept.setdefault("optimizer", torch.optim.AdamW(module.parameters(), lr=1e-2))

    model = seeded(lambda: Toy(once))
    steps.clear()
    for callbacks in ((ReinitTopLayers(params="head"),), (ReinitTopLayers(params="head"),), ()):
        seen = Snapshot()
        before = state(model)
        fit = audited(model, *callbacks, seen, Do(on_train_start=note), epochs=1)
        assert fit.findings == []
        anew = {"head.weight", "head.bias"} if callbacks else set()
        assert changed(before, seen.weights) == anew
    assert steps == [0.0, 0.0, 4.0]  # the last one is the control


@row("I12", prevented="nothing is re-initialised on a resume")
def test_i12_a_resume_keeps_what_was_trained(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"

    def fit(callback: Any, epochs: int, resume: Path | None = None) -> dict[str, Tensor]:
        seen = Snapshot()
        audit = TrainableParamAudit(table=False)
        run = trainer(callback, audit, seen, epochs=epochs)
        run.fit(seeded(Toy), loader(), ckpt_path=resume)
        assert audit.findings == []
        if resume is None:
            run.save_checkpoint(path)
        return seen.weights

    fresh = fit(ReinitTopLayers(1, params="head"), epochs=1)
    trained = torch.load(path)["state_dict"]
    assert {"head.weight", "backbone.blocks.2.linear.weight"} <= changed(fresh, trained)
    resumed = fit(ReinitTopLayers(1, params="head"), epochs=2, resume=path)
    assert not changed(trained, resumed)
    # control, the failure: by hand, in the hook that comes after the weights
    fit(Do(), epochs=1)
    trained = torch.load(path)["state_dict"]
    by_hand = Do(on_fit_start=lambda _, module: reinit(module, "head"))
    assert changed(trained, fit(by_hand, epochs=2, resume=path)) == {"head.weight", "head.bias"}


@row("I13", prevented="the marks that make init functions pass by are dropped for the chosen")
def test_i13_loaded_weights_start_anew_although_transformers_passes_them_by(
    tmp_path: Path,
) -> None:
    model = Text(pretrained(tmp_path))
    bert, before = model.model, state(model)
    for nothing in (
        lambda: bert.encoder.layer[1].apply(bert._init_weights),
        lambda: bert.encoder.layer[1].apply(bert._initialize_weights),
        bert.init_weights,
    ):
        nothing()
        assert not changed(before, state(model))  # the failure
    seen = Snapshot()
    assert audited(model, ReinitTopLayers(1), seen, data=words()).findings == []
    fresh = {name for name in before if "layer.1." in name or ".pooler." in name}
    assert len(fresh) == 18
    assert changed(before, seen.weights) == fresh
    # and the marks are back: what is loaded isn't in danger afterwards
    before = state(model)
    bert.init_weights()
    assert not changed(before, state(model))
