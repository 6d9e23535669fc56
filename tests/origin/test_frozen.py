"""Random and frozen: said where it is known, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers as t
from torch import nn

from lightning_freeze import (
    FreezeBackbone,
    GradualUnfreeze,
    TrainableParamAudit,
    freeze,
    reinit,
    summarize,
)
from tests.toys import trainer

NEW = "classifier.weight, classifier.bias are newly initialised and frozen: they will never learn."


def classifier(saved: Path) -> t.BertForSequenceClassification:
    model: t.BertForSequenceClassification = t.BertForSequenceClassification.from_pretrained(saved)
    return model


def text(model: nn.Module, origin: Any = None) -> str:
    return str(summarize(model, origin=origin))


def test_a_head_that_is_frozen_and_random_is_told(saved: Path) -> None:
    model = classifier(saved)
    assert "never learn" not in text(model)
    freeze(model, "classifier")
    assert NEW in text(model)
    assert NEW in text(model, saved)


def test_one_tensor_is_told_in_the_singular(saved: Path) -> None:
    model = classifier(saved)
    freeze(model, "classifier.weight")
    assert "classifier.weight is newly initialised and frozen: it will never learn." in text(model)


def test_a_frozen_backbone_that_was_loaded_is_none_of_these(saved: Path) -> None:
    model = classifier(saved)
    freeze(model, "bert.encoder")
    assert "never learn" not in text(model)


def test_a_head_that_was_trained_and_then_frozen_has_learnt(saved: Path) -> None:
    model = classifier(saved)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 4, dtype=torch.long)).logits[0, 0].backward()
    optimizer.step()
    freeze(model, "classifier")
    assert "never learn" not in text(model)
    assert "never learn" not in text(model, saved)


def test_a_head_that_was_loaded_later_is_not_random(saved: Path) -> None:
    model = classifier(saved)
    trained = {"weight": torch.ones(2, 16), "bias": torch.ones(2)}
    model.classifier.load_state_dict(trained)
    freeze(model, "classifier")
    assert "never learn" not in text(model)
    assert "never learn" not in text(model, saved)


def test_heads_whose_init_writes_several_times_are_seen_by_their_bias(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1, embed_dim=24)
    weights = {n: w for n, w in model.state_dict().items() if not n.startswith("head")}
    freeze(model, "head")
    assert "head.weight, head.bias are newly initialised and frozen" in text(model, weights)
    with torch.no_grad():
        model.head.bias.fill_(0.5)
    assert "never learn" not in text(model, weights)


def test_what_we_re_initialised_and_froze_is_told(saved: Path) -> None:
    model = classifier(saved)
    reinit(model, "layer.1.output.dense.weight")
    assert "never learn" not in text(model)
    freeze(model, "bert")
    expected = "bert.encoder.layer.1.output.dense.weight is re-initialised and frozen"
    assert expected in text(model)


# In a fit


class Net(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        logits: torch.Tensor = self.model(batch).logits
        return logits.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: pl.LightningModule, *callbacks: pl.Callback) -> None:
    batches = torch.utils.data.DataLoader(torch.randint(0, 50, (4, 6)), batch_size=2)
    trainer(*callbacks, epochs=1).fit(module, batches)


def test_the_audits_first_table_tells_origins_and_what_never_learns(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Net(classifier(saved))
    module.model.requires_grad_(True).train()
    module.model.classifier.requires_grad_(False)
    fit(module, TrainableParamAudit())
    printed = capsys.readouterr().out
    assert "model.classifier.weight, model.classifier.bias are newly initialised" in printed
    assert "2 new, 2 new" not in printed
    assert "loaded" in printed


def test_what_a_schedule_unfreezes_later_is_not_said_to_never_learn(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(Net(classifier(saved)), GradualUnfreeze({0: "layer.1", 1: "**"}), TrainableParamAudit())
    printed = capsys.readouterr().out
    assert "new" in printed
    assert "never learn" not in printed


def test_a_callback_that_keeps_random_weights_frozen_warns(saved: Path) -> None:
    callback = FreezeBackbone("**", trainable="layer.1")
    with pytest.warns(
        UserWarning, match=r"`model.bert.pooler.dense.weight` and 3 more stay frozen"
    ):
        fit(Net(classifier(saved)), callback)


def test_a_callback_that_lets_them_train_does_not(saved: Path) -> None:
    fit(Net(classifier(saved)), FreezeBackbone(trainable="pooler"))  # warnings are errors
