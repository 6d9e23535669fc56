"""FreezeBackbone on real architectures, and each of its arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import FreezeBackbone, TrainableParamAudit, summarize
from tests.oracle import Oracle
from tests.toys import Toy, changed, loader, seeded, state, trainable, trainer

SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 60,
    "max_position_embeddings": 16,
}


class Classifier(LightningModule):
    """A transformers model under a LightningModule, with plain AdamW."""

    def __init__(self, model: nn.Module, lr: float = 1e-3) -> None:
        super().__init__()
        self.model = model
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens, labels = batch
        return self.model(input_ids=tokens, labels=labels).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)


def tokens(labels: int | None = 2, rows: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 60, (rows, 6), generator=generator)
    y = x if labels is None else torch.randint(0, labels, (rows,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def bert(layers: int = 4, kind: Any = transformers.BertForSequenceClassification) -> Any:
    return kind(transformers.BertConfig(num_hidden_layers=layers, **SMALL))


def names_after_fit(model: nn.Module, *callbacks: Any, **options: Any) -> set[str]:
    module = Classifier(model)
    trainer(*callbacks, TrainableParamAudit(table=False), epochs=1, **options).fit(module, tokens())
    return {name.removeprefix("model.") for name in trainable(module)}


def test_on_a_12_layer_bert_exactly_the_classifier_trains() -> None:
    module = Classifier(bert(12))
    before = state(module)
    audit = TrainableParamAudit(table=False)
    trainer(FreezeBackbone(), audit, epochs=1).fit(module, tokens())
    assert trainable(module) == {"model.classifier.weight", "model.classifier.bias"}
    assert changed(before, state(module)) == trainable(module)
    assert audit.findings == []
    assert len(summarize(module).rows) == 201
    assert summarize(module).to_text("parameter").count("│ model.") == 201


def test_masked_lm_table_shows_that_decoder_and_embedding_are_one_tensor() -> None:
    model = bert(kind=transformers.BertForMaskedLM)
    module = Classifier(model)
    before = state(module)
    audit = TrainableParamAudit(table=False)
    trainer(FreezeBackbone(), audit, epochs=1).fit(module, tokens(labels=None))
    text = str(summarize(module))
    line = "model.bert.embeddings.word_embeddings.weight = model.cls.predictions.decoder.weight"
    assert f"one tensor: {line}" in text
    assert not model.cls.predictions.decoder.weight.requires_grad
    moved = changed(before, state(module))
    assert "model.cls.predictions.decoder.weight" not in moved
    assert "model.cls.predictions.bias" in moved
    assert audit.findings == []


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (transformers.RobertaForSequenceClassification, transformers.RobertaConfig),
        (transformers.ElectraForSequenceClassification, transformers.ElectraConfig),
        (transformers.AlbertForSequenceClassification, transformers.AlbertConfig),
        (transformers.DebertaV2ForSequenceClassification, transformers.DebertaV2Config),
        (transformers.MPNetForSequenceClassification, transformers.MPNetConfig),
    ],
)
def test_other_bert_like_families_train_their_head_alone(kind: Any, config: Any) -> None:
    model = kind(config(num_hidden_layers=2, pad_token_id=1, **SMALL))
    names = names_after_fit(model, FreezeBackbone())
    assert names
    assert not any(name.startswith(model.base_model_prefix + ".") for name in names)


def test_top_layers_stay_trainable_with_what_stands_above_them() -> None:
    names = names_after_fit(bert(4), FreezeBackbone(trainable_layers=2))
    parts = {".".join(name.split(".")[:4]) for name in names}
    assert parts == {
        "bert.encoder.layer.2",
        "bert.encoder.layer.3",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }


def test_negative_number_leaves_the_bottom_layers_trainable() -> None:
    names = names_after_fit(bert(4), FreezeBackbone(trainable_layers=-1))
    blocks = {name.split(".")[3] for name in names if "encoder" in name}
    assert blocks == {"0"}
    assert not any("pooler" in name or "embeddings" in name for name in names)


def test_selectors_in_trainable_keep_norms_or_biases_trainable() -> None:
    names = names_after_fit(bert(2), FreezeBackbone(trainable=["**.LayerNorm.*"]))
    assert {n for n in names if "classifier" not in n} == {
        n for n, _ in bert(2).named_parameters() if "LayerNorm" in n
    }
    names = names_after_fit(bert(2), FreezeBackbone(trainable="re:bias$"))
    assert {n for n in names if n.startswith("bert")} == {
        n for n, _ in bert(2).named_parameters() if n.endswith("bias") and n.startswith("bert")
    }


def test_backbone_by_path_glob_and_callable_is_frozen() -> None:
    for selector in ("bert.embeddings", "model.bert.embeddings", "**.embeddings"):
        names = names_after_fit(bert(2), FreezeBackbone(selector))
        assert not any("embeddings" in name for name in names)
        assert any("encoder" in name for name in names)
    names = names_after_fit(bert(2), FreezeBackbone([lambda name, p: p.ndim == 2]))
    assert all(dict(bert(2).named_parameters())[name].ndim == 1 for name in names)


class Vgg(LightningModule):
    """torchvision's VGG16 with a head for three classes."""

    def __init__(self) -> None:
        super().__init__()
        torchvision = pytest.importorskip("torchvision")
        self.model = torchvision.models.vgg16(weights=None, num_classes=3, dropout=0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def configure_optimizers(self) -> Any:
        # no momentum: the model has 134 million parameters
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.slow
def test_vgg16_trains_its_classifier_first_and_everything_from_epoch_k() -> None:
    x = torch.randn(2, 3, 32, 32)
    data = DataLoader(TensorDataset(x, torch.tensor([0, 1])), batch_size=2)
    module = Vgg()
    seen: list[set[str]] = []

    class Look(TrainableParamAudit):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *rest)
            seen.append({name.split(".")[1] for name in trainable(pl_module)})

    before = {n: p.detach().clone() for n, p in module.model.features.named_parameters()}
    trainer(FreezeBackbone(unfreeze_at_epoch=1), Look(table=False), epochs=2).fit(module, data)
    assert seen == [{"classifier"}, {"features", "classifier"}]
    assert not torch.equal(before["0.weight"], module.model.features[0].weight)


def test_released_backbone_trains_at_the_factor_and_not_before() -> None:
    model = seeded(Toy)
    before = state(model)
    trainer(FreezeBackbone(unfreeze_at_epoch=2), epochs=2).fit(model, loader())
    assert not any(name.startswith("backbone") for name in changed(before, state(model)))
    model = seeded(Toy)
    oracle = Oracle(lambda name: 1.0 if name.startswith("head") else 0.1)
    trainer(FreezeBackbone(unfreeze_at_epoch=2, lr_scale=0.1), oracle, epochs=3).fit(
        model, loader()
    )
    assert "backbone.embed.weight" in changed(before, state(model))
    assert oracle.wrong == []


def test_user_frozen_parameters_stay_frozen_unless_a_selector_names_them() -> None:
    model = seeded(Toy)
    model.backbone.embed.requires_grad_(False)
    trainer(FreezeBackbone(unfreeze_at_epoch=1), epochs=2).fit(model, loader())
    assert "backbone.embed.weight" not in trainable(model)
    assert "backbone.blocks.0.linear.weight" in trainable(model)
    model = seeded(Toy)
    model.backbone.embed.requires_grad_(False)
    before = state(model)
    trainer(FreezeBackbone(trainable="backbone.embed"), epochs=1).fit(model, loader())
    assert "backbone.embed.weight" in changed(before, state(model))


@dataclass
class Counting(Callback):
    """A callback of somebody's, as a dataclass: it has no hash."""

    batches: int = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1


def test_a_callback_beside_it_needs_no_hash() -> None:
    counting = Counting()
    audit = TrainableParamAudit(table=False)
    trainer(counting, FreezeBackbone(), audit, epochs=1).fit(seeded(Toy), loader())
    assert counting.batches == 4
    assert audit.findings == []
