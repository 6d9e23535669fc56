"""Each recipe in examples/recipes on a tiny model: what must train moves, the rest doesn't."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from lightning_freeze import ReinitTopLayers, TrainableParamAudit
from tests.toys import changed, state, trainer

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
ALL = sorted(path.stem for path in RECIPES.glob("*.py"))


def recipe(name: str) -> list[Callback]:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.CALLBACKS)


class Learner(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.model(batch[0])
        return nn.functional.cross_entropy(getattr(out, "logits", out), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class TinyVgg(nn.Module):
    """The shape of torchvision's VGG16: features, a pool, a classifier of three layers."""

    def __init__(self) -> None:
        super().__init__()
        conv = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3)]
        self.features = nn.Sequential(*conv, nn.ReLU(), nn.MaxPool2d(2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class TinyResNet(nn.Module):
    """The shape of a ResNet: a stem, stages with batch norms, `fc`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


def bert(layers: int = 3) -> nn.Module:
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


IMAGES = {"head_first_vgg16": TinyVgg, "batch_norm_only": TinyResNet}


def make(name: str, layers: int = 3) -> tuple[Learner, DataLoader[Any]]:
    torch.manual_seed(3)
    model = Learner(IMAGES[name]() if name in IMAGES else bert(layers))
    generator = torch.Generator().manual_seed(5)
    y = torch.randint(0, 3, (16,), generator=generator)
    if name in IMAGES:
        x = torch.randn(16, 3, 12, 12, generator=generator)
    else:
        x = torch.randint(0, 20, (16, 8), generator=generator)
    return model, DataLoader(TensorDataset(x, y), batch_size=4)


class Watch(Callback):
    """Names of what changed in each epoch."""

    def __init__(self) -> None:
        self.epochs: list[set[str]] = []

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.before = state(module)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.epochs.append(changed(self.before, state(module)))


def fit(name: str, epochs: int, layers: int = 3) -> tuple[Learner, list[set[str]], Any]:
    model, data = make(name, layers)
    callbacks, watch = recipe(name), Watch()
    run = trainer(*callbacks, watch, epochs=epochs)
    run.fit(model, data)
    audit = next(cb for cb in callbacks if isinstance(cb, TrainableParamAudit))
    assert audit.findings == []
    assert "clean" in audit.verdict
    return model, watch.epochs, run


def names(model: nn.Module, *parts: str) -> set[str]:
    """Names that begin with one of these, or end with one that begins with a dot."""
    return {
        n
        for n in (name.removeprefix("model.") for name in model.state_dict())
        if any(n.endswith(part) if part.startswith(".") else n.startswith(part) for part in parts)
    }


def short(found: set[str]) -> set[str]:
    return {name.removeprefix("model.") for name in found}


HEAD = ("classifier", "bert.pooler")
LAYER = "bert.encoder.layer."


def test_every_recipe_is_described_and_few_lines_long() -> None:
    described = (RECIPES / "README.md").read_text()
    for name in ALL:
        text = (RECIPES / f"{name}.py").read_text()
        (row,) = [line for line in described.splitlines() if f"({name}.py)" in line]
        shown = re.findall("`([^`]+)`", row)
        assert shown
        assert all(f"{call}," in text for call in shown)
        assert "https://" in text
        assert len(text.partition('"""\n\n')[2].splitlines()) <= 8
    assert len(ALL) == 11


# name -> what trains in each epoch, as beginnings of names; `.x` is an ending, None everything
STAGES: dict[str, list[tuple[str, ...] | None]] = {
    "ulmfit": [HEAD, (*HEAD, f"{LAYER}2"), (*HEAD, f"{LAYER}2", f"{LAYER}1"), (*HEAD, LAYER), None],
    "lp_ft": [("classifier",)] * 3 + [None],
    "chain_thaw": [HEAD, ("bert.embeddings",), *((f"{LAYER}{n}",) for n in range(3)), None],
    "surgical": [(f"{LAYER}0.",)] * 2,
    "bitfit": [("classifier", ".bias")] * 2,
    "layer_norm_only": [("classifier", ".LayerNorm.weight", ".LayerNorm.bias")] * 2,
    "few_sample_bert": [None, None],
    "head_first_vgg16": [("classifier",)] * 3 + [None],
}


@pytest.mark.parametrize("name", STAGES)
def test_a_recipe_moves_what_its_paper_trains_and_nothing_else(name: str) -> None:
    model, epochs, _ = fit(name, len(STAGES[name]))
    for epoch, parts in enumerate(STAGES[name]):
        expected = names(model, *(parts or ("",)))
        # attention doesn't depend on the bias of keys, and the ids are buffers
        still = {n for n in expected if n.endswith((".key.bias", "position_ids"))}
        assert short(epochs[epoch]) - still == expected - still, epoch
        assert len(expected) >= 2


def test_batch_norm_only_moves_nothing_but_batch_norms() -> None:
    model, epochs, _ = fit("batch_norm_only", 2)
    expected = names(model, "bn1.", "layer1.1.", "layer2.1.")
    assert short(epochs[0]) == short(epochs[1]) == expected
    assert len(expected) == 15


def test_few_sample_bert_gives_the_top_layers_and_the_pooler_a_fresh_start() -> None:
    model, _ = make("few_sample_bert")
    before = state(model)
    run = trainer(*[cb for cb in recipe("few_sample_bert") if isinstance(cb, ReinitTopLayers)])
    run.fit_loop.max_epochs = 0
    run.fit(model, make("few_sample_bert")[1])
    fresh = short(changed(before, state(model)))
    matrices = {n for n in names(model, f"{LAYER}1", f"{LAYER}2", "bert.pooler") if "Norm" not in n}
    assert fresh == {n for n in matrices if n.endswith("weight")}
    model, data = make("few_sample_bert")
    callbacks = recipe("few_sample_bert")
    audit = next(cb for cb in callbacks if isinstance(cb, TrainableParamAudit))
    trainer(*callbacks, epochs=1).fit(model, data)
    lrs = list(audit.moments[-1].lr.values())
    assert lrs == pytest.approx([1e-2 * 0.95**distance for distance in (4, 3, 2, 1, 0)])


def test_lisa_trains_two_of_the_layers_until_it_draws_anew() -> None:
    model, epochs, _ = fit("lisa", 12, layers=6)  # 4 steps an epoch, 20 steps a draw
    always = names(model, "bert.embeddings", *HEAD)
    for first, last in ((0, 5), (5, 10), (10, 12)):
        drawn = [{n.split(".")[3] for n in short(e) if LAYER in n} for e in epochs[first:last]]
        assert all(layers == drawn[0] for layers in drawn)
        assert len(drawn[0]) == 2
        expected = always | {n for d in drawn[0] for n in names(model, f"{LAYER}{d}.")}
        still = {n for n in expected if n.endswith((".key.bias", "position_ids"))}
        assert all(short(moved) - still == expected - still for moved in epochs[first:last])
    every = {n for moved in epochs for n in short(moved) if LAYER in n}
    assert len({n.split(".")[3] for n in every}) > 2  # another layer came in


def test_autofreeze_freezes_from_the_bottom_and_never_the_head() -> None:
    model, epochs, _ = fit("autofreeze", 8, layers=6)
    layers = [names(model, "bert.embeddings"), *(names(model, f"{LAYER}{n}.") for n in range(6))]
    still = [n for moved in epochs for n in names(model, *HEAD) - short(moved)]
    assert still == []
    counts = []
    for moved in epochs:
        trains = [bool(layer & short(moved)) for layer in layers]
        assert trains == sorted(trains)  # what is frozen is at the bottom
        counts.append(trains.count(False))
    assert counts == sorted(counts)
    assert counts[:2] == [0, 0]  # two intervals are compared first
    assert 0 < counts[-1] < 7
