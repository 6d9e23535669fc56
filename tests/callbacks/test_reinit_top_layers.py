"""ReinitTopLayers in a fit: what changes, what doesn't, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import Callback, Trainer

from lightning_freeze import ReinitError, ReinitTopLayers
from tests.callbacks.test_freeze_backbone import Classifier, bert, tokens
from tests.toys import Block, Toy, changed, loader, seeded, state, trainer


class AtStart(Callback):
    """The weights as training begins."""

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.weights = state(module)


def loaded(folder: Any) -> Classifier:
    torch.manual_seed(11)
    model = bert(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)  # as if trained: LayerNorm is no longer ones and zeros
    model.save_pretrained(folder)
    return Classifier(transformers.AutoModelForSequenceClassification.from_pretrained(folder))


def reinitialised(folder: Any, *callbacks: Callback) -> tuple[set[str], Classifier, AtStart]:
    module = loaded(folder)
    before, look = state(module), AtStart()
    trainer(*callbacks, look, epochs=1).fit(module, tokens())
    names = {name.removeprefix("model.") for name in changed(before, look.weights)}
    return names, module, look


def test_top_three_layers_of_loaded_weights_start_anew_with_the_pooler(tmp_path: Any) -> None:
    names, module, look = reinitialised(tmp_path, ReinitTopLayers(3, seed=0))
    expected = {
        name
        for name, _ in module.model.named_parameters()
        if name.startswith(tuple(f"bert.encoder.layer.{i}." for i in (1, 2, 3))) or "pooler" in name
    }
    assert names == expected
    for name in expected:
        value = look.weights["model." + name]
        if "LayerNorm.weight" in name:
            assert torch.all(value == 1)
        elif name.endswith("bias"):
            assert torch.all(value == 0)


def test_one_layers_query_starts_anew_alone(tmp_path: Any) -> None:
    query = "bert.encoder.layer.0.attention.self.query"
    names, _, _ = reinitialised(tmp_path, ReinitTopLayers(params=[query]))
    assert names == {query + ".weight", query + ".bias"}


def test_pooler_can_stay(tmp_path: Any) -> None:
    names, _, _ = reinitialised(tmp_path, ReinitTopLayers(1, pooler=False))
    assert {name.split(".")[1] for name in names} == {"encoder"}


def test_same_seed_gives_the_same_values_and_leaves_the_global_generator_alone(
    tmp_path: Any,
) -> None:
    starts = [reinitialised(tmp_path, ReinitTopLayers(1, seed=s))[2].weights for s in (4, 4, 5)]
    assert changed(starts[0], starts[1]) == set()
    assert changed(starts[0], starts[2]) != set()


def test_callable_init_writes_each_tensor(tmp_path: Any) -> None:
    def halve(name: str, parameter: torch.nn.Parameter) -> None:
        parameter.mul_(0.5)

    callback = ReinitTopLayers(params="bert.embeddings.word_embeddings", init=halve)
    before = state(loaded(tmp_path))
    _, _, look = reinitialised(tmp_path, callback)
    name = "model.bert.embeddings.word_embeddings.weight"
    assert torch.equal(look.weights[name], before[name] * 0.5)


def test_init_that_changes_nothing_raises_and_leaves_the_model_as_it_was(tmp_path: Any) -> None:
    module = loaded(tmp_path)
    before = state(module)
    callback = ReinitTopLayers(1, init=lambda name, parameter: None)
    with pytest.raises(ReinitError, match="changed nothing"):
        trainer(callback, epochs=1).fit(module, tokens())
    assert changed(before, state(module)) == set()


def test_ties_survive() -> None:
    model = bert(2, kind=transformers.BertForMaskedLM)
    module = Classifier(model)
    before = state(module)
    callback = ReinitTopLayers(params="cls.predictions.decoder.weight")
    look = AtStart()
    trainer(callback, look, epochs=1).fit(module, tokens(labels=None))
    decoder = model.cls.predictions.decoder.weight
    assert decoder is model.bert.embeddings.word_embeddings.weight
    assert changed(before, look.weights) == {
        "model.cls.predictions.decoder.weight",
        "model.bert.embeddings.word_embeddings.weight",
    }


class Grows(Toy):
    """Adds a block on top when it is configured, or in its own `setup`."""

    def __init__(self) -> None:
        super().__init__(blocks=2)

    def grow(self) -> None:
        if len(self.backbone.blocks) == 2:
            torch.manual_seed(5)
            self.backbone.blocks.append(Block(8))


class GrowsInSetup(Grows):
    def setup(self, stage: str) -> None:
        self.grow()


class GrowsWhenConfigured(Grows):
    def configure_model(self) -> None:
        self.grow()


@pytest.mark.parametrize("make", [GrowsInSetup, GrowsWhenConfigured])
def test_a_top_layer_that_is_made_late_is_the_one_that_starts_anew(make: Any) -> None:
    looks = []
    for callbacks in ([], [ReinitTopLayers(1, seed=3)]):
        model, look = seeded(make), AtStart()
        trainer(*callbacks, look, epochs=1).fit(model, loader())
        looks.append(look.weights)
    fresh = {name for name in changed(*looks) if "norm" not in name}
    assert fresh == {"backbone.blocks.2.linear.weight", "backbone.blocks.2.linear.bias"}
