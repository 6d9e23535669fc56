"""Tables: golden text, totals, statuses."""

from __future__ import annotations

import json

import pytest
import torch
from rich.table import Table
from torch import nn

from lightning_freeze import freeze, summarize
from lightning_freeze.engine.optimizers import OptimizerGroups
from lightning_freeze.errors import ArgumentError
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.report.summary import Summary, groups_or_children, rows_of, to_text
from tests.goldens import assert_golden
from tests.zoo import tiny_bert, tiny_bert_lm


def frozen_bert() -> nn.Module:
    model = tiny_bert(12).train()
    freeze(model, "bert")
    return model


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(3, 1)


# Golden tables


def test_table_by_group_of_a_frozen_bert() -> None:
    assert_golden("report/bert-frozen-groups.txt", str(summarize(frozen_bert())))


def test_table_of_all_201_parameters_of_a_frozen_bert() -> None:
    summary = summarize(frozen_bert())
    assert len(summary.rows) == 201
    assert_golden("report/bert-frozen-parameters.txt", summary.to_text("parameter"))


def test_table_of_a_masked_lm_shows_decoder_and_embedding_as_one_tensor() -> None:
    summary = summarize(tiny_bert_lm().train())
    (tied,) = [row for row in summary.rows if row.tied_to and "weight" in row.name]
    assert tied.name == "bert.embeddings.word_embeddings.weight"
    assert tied.tied_to == ("cls.predictions.decoder.weight",)
    assert_golden("report/bert-masked-lm-groups.txt", summary.to_text())
    assert_golden("report/bert-masked-lm-parameters.txt", summary.to_text("parameter"))


def test_table_with_an_optimizer_has_learning_rates_and_tells_what_it_leaves_out() -> None:
    model = frozen_bert()
    optimizer = torch.optim.AdamW([{"params": [model.classifier.weight], "lr": 3e-4}])
    assert_golden("report/bert-one-tensor-in-optimizer.txt", str(summarize(model, optimizer)))


def test_table_with_rates_shows_what_each_group_trains_at() -> None:
    model = tiny_bert(3).train()
    index = ModelIndex.of(model)
    groups = groups_or_children(index)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scale = {
        name: 0.5 ** (len(groups) - 1 - position)
        for position, group in enumerate(groups)
        for name in group.parameters
    }
    held = OptimizerGroups(index, [optimizer], scale)
    held.sync(frozenset(freeze(model, ["bert.embeddings", "layer.0"])))
    rows = rows_of(index, groups, [optimizer], rates=held.rates())
    assert_golden("report/bert-split-groups.txt", str(Summary(rows)))


# Facts and totals


def test_totals_count_elements_and_a_tied_tensor_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 2), "decoder": nn.Linear(2, 5)})
    model["decoder"].weight = model["embed"].weight
    summary = summarize(model)
    assert (summary.trainable, summary.total) == (15, 15)
    freeze(model, "decoder.weight")
    assert (summarize(model).trainable, summarize(model).total) == (5, 15)


def test_a_row_says_what_a_tensor_is() -> None:
    model = Toy()
    freeze(model, "backbone")
    rows = {row.name: row for row in summarize(model).rows}
    row = rows["backbone.0.weight"]
    assert (row.shape, row.parameters, row.dtype) == ((3, 2), 6, "float32")
    assert (row.trainable, row.training, row.status) == (False, False, "frozen")
    assert rows["head.bias"].status == "trains"
    assert rows["head.bias"].training
    assert rows["scale"].shape == ()
    assert rows["head.bias"].lr is None


def test_without_an_optimizer_nothing_is_missing_from_it() -> None:
    assert {row.status for row in summarize(Toy()).rows} == {"trains"}


def test_what_is_in_no_optimizer_does_not_count_as_trainable() -> None:
    model = Toy()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.5)
    summary = summarize(model, optimizer)
    assert summary.trainable == 4
    status = {row.name: row.status for row in summary.rows}
    assert status["head.weight"] == "trains"
    assert status["backbone.0.weight"] == status["scale"] == "in no optimizer"
    assert {row.lr for row in summary.rows if row.status == "trains"} == {0.5}


def test_several_optimizers_share_a_model() -> None:
    model = Toy()
    optimizers = [
        torch.optim.SGD(model.backbone.parameters(), lr=0.5),
        torch.optim.SGD([model.scale, *model.head.parameters()], lr=0.25),
    ]
    lrs = {row.name: row.lr for row in summarize(model, optimizers).rows}
    assert (lrs["backbone.0.weight"], lrs["head.weight"]) == (0.5, 0.25)
    assert summarize(model, optimizers).trainable == summarize(model).total


def test_an_empty_list_of_optimizers_holds_nothing() -> None:
    assert {row.status for row in summarize(Toy(), []).rows} == {"in no optimizer"}


def test_a_model_without_a_backbone_is_grouped_by_its_children() -> None:
    model = nn.Module()
    model.a, model.b = nn.Linear(1, 1), nn.Bilinear(1, 1, 1)
    model.own = nn.Parameter(torch.zeros(1))
    assert [row.layer_group for row in summarize(model).rows] == ["(own)", "a", "a", "b", "b"]


def test_a_model_without_parameters_has_an_empty_table() -> None:
    summary = summarize(nn.ReLU())
    assert (summary.rows, summary.total) == ((), 0)
    assert "0 of 0 parameters train (0.00 %), 0 of 0 tensors." in str(summary)


def test_a_summary_is_plain_values_for_json() -> None:
    model = frozen_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.5))
    content = json.loads(json.dumps(summarize(model, optimizer).to_dict()))
    assert content["trainable"] == 34
    assert content["total"] == summarize(model).total
    assert len(content["rows"]) == 201
    assert content["rows"][-1]["lr"] == 0.5


def test_repr_is_the_table_by_group() -> None:
    summary = summarize(Toy())
    assert repr(summary) == str(summary) == summary.to_text("group")


def test_title_and_notes_stand_above_and_below() -> None:
    lines = str(Summary(summarize(Toy()).rows, "Epoch 3", ("A note.",))).splitlines()
    assert lines[0] == "Epoch 3"
    assert lines[-1] == "A note."


def test_by_is_group_or_parameter() -> None:
    with pytest.raises(ArgumentError, match=r"`by` is 'layer'\. Write \"group\" or"):
        summarize(Toy()).to_text("layer")


def test_a_name_in_brackets_is_no_style() -> None:
    table = Table("layer group")
    table.add_row("encoder.[ab].[/b]")
    assert "encoder.[ab].[/b]" in to_text(table)


def test_a_long_name_is_kept_whole() -> None:
    model = nn.ModuleDict({"x" * 150: nn.Linear(1, 1), "head": nn.Linear(1, 1)})
    text = summarize(model).to_text("parameter")
    squeezed = "".join(character for character in text if character.isalnum() or character == ".")
    assert "x" * 60 in squeezed
    assert text.count("x") >= 300


def test_summarizing_changes_nothing() -> None:
    model = frozen_bert()
    optimizer = torch.optim.AdamW(model.parameters())
    before = [(p.requires_grad, p._version) for p in model.parameters()]
    groups = [len(group["params"]) for group in optimizer.param_groups]
    str(summarize(model, optimizer))
    assert [(p.requires_grad, p._version) for p in model.parameters()] == before
    assert [len(group["params"]) for group in optimizer.param_groups] == groups


def test_a_summary_is_a_table_in_a_notebook_whose_names_are_escaped() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model.add_module("<b>", nn.Linear(1, 1))
    text = summarize(model)._repr_html_()
    assert text.count("<tr>") == 1 + len({row.layer_group for row in summarize(model).rows})
    assert "<b>" not in text
    assert "11 of 11 parameters train (100.00 %), 6 of 6 tensors." in text
    assert "background: transparent" in text  # the theme's own colours
