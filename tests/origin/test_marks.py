"""What a model that `from_pretrained` made tells by itself, and what it can't."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_freeze import freeze, reinit, summarize
from tests.goldens import assert_golden
from tests.origin.asking import counts, new_ones, of, states
from tests.zoo import tiny_bert, tiny_bert_lm


class Wrapped(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.extra = nn.Linear(2, 2)


def from_saved(saved: Path, **kwargs: Any) -> Any:
    return t.BertForSequenceClassification.from_pretrained(saved, **kwargs)


def test_of_real_weights_all_are_loaded_but_the_head(minilm: str) -> None:
    model = t.BertForSequenceClassification.from_pretrained(minilm)
    assert counts(model) == {"loaded": 103, "new": 2}
    assert new_ones(model) == {"classifier.weight", "classifier.bias"}
    assert "2 loaded, 2 new" in str(summarize(model))
    assert "by the marks that `from_pretrained` left" in str(summarize(model))


def test_a_masked_lm_on_weights_without_its_head_shares_the_embedding(minilm: str) -> None:
    model = t.BertForMaskedLM.from_pretrained(minilm)
    rows = {row.name: row for row in summarize(model).rows}
    tied = rows["bert.embeddings.word_embeddings.weight"]
    assert (tied.origin, tied.tied_to) == ("loaded", ("cls.predictions.decoder.weight",))
    assert rows["cls.predictions.bias"].origin == "new"


def test_a_masked_lm_got_its_bias_from_the_checkpoint(saved: Path) -> None:
    model = t.BertForMaskedLM.from_pretrained(saved)
    rows = {row.name: row for row in summarize(model).rows}
    assert set(of(summarize(model)).values()) == {"loaded"}
    assert rows["cls.predictions.bias"].tied_to == ("cls.predictions.decoder.bias",)
    assert_golden("origin/masked-lm-groups.txt", str(summarize(model)))
    assert_golden("origin/masked-lm-parameters.txt", summarize(model).to_text("parameter"))


def test_another_head_on_the_same_weights_is_new_and_so_is_the_pooler(saved: Path) -> None:
    assert new_ones(from_saved(saved)) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }


def test_a_head_of_another_size_is_new(saved: Path, tmp_path: Path) -> None:
    from_saved(saved, num_labels=7).save_pretrained(tmp_path)
    model = from_saved(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert new_ones(model) == {"classifier.weight", "classifier.bias"}


def test_the_first_names_of_layer_norms_are_loaded(saved: Path, tmp_path: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    legacy = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in weights.items()
    }
    assert legacy.keys() != weights.keys()
    save_file(legacy, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    model = t.BertForMaskedLM.from_pretrained(tmp_path)
    assert set(states(model).values()) == {"loaded"}


def test_batch_norm_statistics_are_buffers_of_the_table(tmp_path: Path) -> None:
    config = t.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_channels=3)
    t.ResNetModel(config).save_pretrained(tmp_path)
    model = t.ResNetForImageClassification.from_pretrained(tmp_path)
    summary = summarize(model)
    assert {name for name, state in of(summary).items() if state == "new"} == {
        "classifier.1.weight",
        "classifier.1.bias",
    }
    assert len(summary.buffers) > 10
    assert set(summary.buffers.values()) == {"loaded"}
    assert f"Buffers: {len(summary.buffers)} loaded." in str(summary)


# What can't be known


def test_a_model_made_from_a_config_was_not_loaded_and_its_table_is_as_before() -> None:
    model = tiny_bert()
    assert set(states(model).values()) == {"unknown"}
    assert "origin" not in str(summarize(model)).lower()


def test_a_copy_of_a_loaded_model_has_no_marks(saved: Path) -> None:
    model = from_saved(saved)
    assert "loaded" in states(model).values()
    assert set(states(copy.deepcopy(model)).values()) == {"unknown"}


def test_a_plain_module_tells_nothing() -> None:
    assert set(states(nn.Linear(2, 2)).values()) == {"unknown"}


def test_loading_other_weights_later_is_seen(saved: Path) -> None:
    model = from_saved(saved)
    assert set(states(model).values()) == {"loaded", "new"}
    model.load_state_dict(from_saved(saved).state_dict())
    assert set(states(model).values()) == {"written since", "unknown"}


def test_a_replaced_parameter_is_not_called_new(saved: Path) -> None:
    model = from_saved(saved)
    model.classifier.weight = nn.Parameter(torch.ones(2, 16))
    assert states(model)["classifier.weight"] == "unknown"
    model.classifier = nn.Linear(16, 2)
    assert states(model)["classifier.weight"] == "new"


def test_a_head_that_was_trained_on_a_frozen_backbone_is_still_new(saved: Path) -> None:
    model = from_saved(saved)
    freeze(model, "bert")
    optimizer = torch.optim.SGD(model.classifier.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.ones(1, 4, dtype=torch.long)).logits[0, 0].backward()
        optimizer.step()
    assert states(model)["classifier.weight"] == "new"
    assert states(model)["bert.encoder.layer.0.attention.self.query.weight"] == "loaded"


def test_training_is_a_write(saved: Path) -> None:
    model = from_saved(saved)
    model(torch.ones(1, 4, dtype=torch.long)).logits[0, 0].backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    found = states(model)
    assert found["bert.encoder.layer.0.attention.self.query.weight"] == "written since"
    assert found["classifier.weight"] == "unknown"


def test_a_change_of_dtype_is_no_write(saved: Path) -> None:
    model = from_saved(saved)
    before = states(model)
    assert states(model.half()) == before


# Wherever the model stands


def test_inside_of_a_lightning_module_its_own_part_is_unknown(saved: Path) -> None:
    found = states(Wrapped(from_saved(saved)))
    assert found["model.bert.embeddings.LayerNorm.weight"] == "loaded"
    assert found["model.classifier.weight"] == "new"
    assert found["extra.weight"] == "unknown"


def test_two_models_side_by_side_are_told_apart(saved: Path) -> None:
    pair = nn.ModuleDict({"student": tiny_bert_lm(2), "teacher": from_saved(saved)})
    found = states(pair)
    assert found["student.bert.embeddings.LayerNorm.weight"] == "unknown"
    assert found["teacher.bert.embeddings.LayerNorm.weight"] == "loaded"


def test_a_compiled_model_is_the_same_model(saved: Path) -> None:
    model = from_saved(saved)
    assert states(torch.compile(model, backend="eager")) == states(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_new(saved: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        from_saved(saved), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    )
    found = states(model)
    layer = "base_model.model.bert.encoder.layer.0.attention.self.query"
    assert found[f"{layer}.base_layer.weight"] == "loaded"
    assert found[f"{layer}.lora_A.default.weight"] == "new"


# Re-initialised by us


def test_what_was_re_initialised_is_told_and_the_rest_stays_loaded(minilm: str) -> None:
    model = t.BertForSequenceClassification.from_pretrained(minilm)
    names = reinit(model, ["layer.5", "bert.pooler"], seed=1)
    found = states(model)
    assert {name for name, state in found.items() if state == "re-initialised"} == set(names)
    assert found["bert.encoder.layer.4.output.dense.weight"] == "loaded"
    assert "re-initialised" in str(summarize(model))
