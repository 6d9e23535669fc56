"""What transformers and torch say when they load, and which part of a model it is about."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as t
from torch import nn
from transformers.utils.loading_report import LoadStateDictInfo

from lightning_freeze import summarize
from lightning_freeze.checkpoints.origin.loading import as_info
from lightning_freeze.errors import ArgumentError
from tests.origin.asking import new_ones, of, states
from tests.zoo import tiny_bert


def test_of_real_weights_the_info_and_the_marks_agree(minilm: str) -> None:
    for kind in (t.BertForSequenceClassification, t.BertForMaskedLM, t.BertModel):
        model, info = kind.from_pretrained(minilm, output_loading_info=True)
        assert states(model, info) == states(model)
        assert summarize(model, origin=info).unused == tuple(sorted(info["unexpected_keys"]))


def test_the_keys_that_were_not_used_stand_below_the_table(minilm: str) -> None:
    model, info = t.BertForMaskedLM.from_pretrained(minilm, output_loading_info=True)
    text = str(summarize(model, origin=info))
    assert "2 keys of the checkpoint aren't used: pooler.dense.bias, pooler.dense.weight" in text
    assert "by what was reported when the model was loaded" in text


def test_a_head_of_another_size(saved: Path, tmp_path: Path) -> None:
    old = t.BertForSequenceClassification.from_pretrained(saved, num_labels=7)
    old.save_pretrained(tmp_path)
    model, info = t.BertForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    summary = summarize(model, origin=info)
    row = next(row for row in summary.rows if row.name == "classifier.weight")
    assert (row.origin, row.origin_detail) == ("other shape", "7x16 in the checkpoint")
    assert of(summary)["bert.pooler.dense.bias"] == "loaded"


def test_the_model_stands_in_another_module(saved: Path) -> None:
    model, info = t.BertForSequenceClassification.from_pretrained(saved, output_loading_info=True)
    both = nn.ModuleDict({"net": model, "extra": nn.Linear(1, 1)})
    found = states(both, info)
    assert found["net.classifier.weight"] == "new"
    assert found["net.bert.embeddings.LayerNorm.weight"] == "loaded"
    assert found["extra.weight"] == "unknown"


def test_of_two_models_the_info_says_which_one_if_it_can(saved: Path) -> None:
    one, info = t.BertForSequenceClassification.from_pretrained(saved, output_loading_info=True)
    lm, nothing_missing = t.BertForMaskedLM.from_pretrained(saved, output_loading_info=True)
    pair = nn.ModuleDict({"a": lm, "b": one})
    assert states(pair, info)["b.classifier.weight"] == "new"
    with pytest.raises(ArgumentError, match=r'may be about `a`, `b`.*origin=\{"a": info\}'):
        summarize(pair, origin=nothing_missing)
    found = states(pair, {"a": nothing_missing, "b": info})
    assert found["a.cls.predictions.bias"] == "loaded"
    assert found["b.classifier.weight"] == "new"


def test_the_info_of_another_model_is_refused(saved: Path) -> None:
    _, info = t.BertForSequenceClassification.from_pretrained(saved, output_loading_info=True)
    with pytest.raises(
        ArgumentError, match=r"has none of the tensors.*`bert\.pooler\.dense\.bias`"
    ):
        summarize(nn.Linear(1, 1), origin=info)


def test_what_torch_returns_when_it_loads_a_part() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    content = {n: w for n, w in model.state_dict().items() if not n.startswith("2.")}
    said = model.load_state_dict({**content, "old.weight": torch.ones(1)}, strict=False)
    summary = summarize(model, origin=said)
    assert new_ones(model, said) == {"2.weight", "2.bias"}
    assert summary.unused == ("old.weight",)
    assert set(summary.buffers.values()) == {"loaded"}


def test_a_tied_tensor_is_loaded_under_any_of_its_names() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "out": nn.Linear(2, 4, bias=False)})
    model["out"].weight = model["embed"].weight
    said = model.load_state_dict({"embed.weight": torch.ones(4, 2)}, strict=False)
    assert said.missing_keys == ["out.weight"]
    assert states(model, said) == {"embed.weight": "loaded"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_that_were_added_later_are_new(saved: Path) -> None:
    peft = pytest.importorskip("peft")
    model, info = t.BertForSequenceClassification.from_pretrained(saved, output_loading_info=True)
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    found = states(peft.get_peft_model(model, config), info)
    layer = "base_model.model.bert.encoder.layer.0.attention.self.query"
    assert found[f"{layer}.base_layer.weight"] == "loaded"
    assert found[f"{layer}.lora_A.default.weight"] == "new"
    assert found["base_model.model.classifier.original_module.weight"] == "new"


def test_the_info_object_of_transformers_itself() -> None:
    nothing: set[str] = set()
    said = LoadStateDictInfo(
        missing_keys={"classifier.weight", "classifier.bias"},
        unexpected_keys=nothing,
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=nothing,
    )
    found = states(tiny_bert(2), said)
    assert found["classifier.weight"] == "new"
    assert found["bert.pooler.dense.weight"] == "loaded"


def test_a_state_dict_is_no_info() -> None:
    assert as_info({"missing": torch.ones(1)}) is None
    assert as_info("missing_keys") is None
