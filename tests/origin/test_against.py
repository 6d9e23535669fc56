"""A model against checkpoints of every form: same bytes, other bytes, missing, not used."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_freeze import reinit, summarize
from lightning_freeze.errors import ArgumentError, VerifyError
from lightning_freeze.report.summary import Row
from tests.goldens import assert_golden
from tests.origin.asking import counts, new_ones, of, states
from tests.toys import Toy, loader, seeded, trainer
from tests.verify.files import save
from tests.zoo import tiny_bert, tiny_bert_lm


def rows(model: nn.Module, origin: Any) -> dict[str, Row]:
    return {row.name: row for row in summarize(model, origin=origin).rows}


class Net(nn.Module):
    """A backbone with a batch-norm, and a head."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, classes)


# transformers' folders


def test_of_real_weights_every_tensor_is_compared(minilm: str) -> None:
    model = t.BertForSequenceClassification.from_pretrained(minilm)
    summary = summarize(model, origin=minilm)
    assert counts(model, minilm) == {"loaded": 103, "new": 2}
    row = next(r for r in summary.rows if r.name == "bert.pooler.dense.bias")
    assert row.checkpoint_key == "pooler.dense.bias"
    assert summary.unused == ("embeddings.position_ids",)
    assert "compared to the bit with" in str(summary)


def test_the_bare_model_and_the_masked_lm_on_the_same_weights(minilm: str) -> None:
    bare = t.BertModel.from_pretrained(minilm)
    assert counts(bare, minilm) == {"loaded": 103}
    lm = t.BertForMaskedLM.from_pretrained(minilm)
    summary = summarize(lm, origin=minilm)
    assert summary.unused[1:] == ("pooler.dense.bias", "pooler.dense.weight")
    assert of(summary)["cls.predictions.bias"] == "new"
    assert of(summary)["bert.embeddings.word_embeddings.weight"] == "loaded"


def test_one_tensor_that_was_moved_by_one_bit_is_found(minilm: str) -> None:
    model = t.BertModel.from_pretrained(minilm)
    weight = model.encoder.layer[3].output.dense.weight.data
    weight.view(torch.int32)[5, 7] ^= 1
    assert counts(model, minilm) == {"loaded": 102, "changed since": 1}
    assert states(model, minilm)["encoder.layer.3.output.dense.weight"] == "changed since"


def test_the_head_that_a_checkpoint_had_is_not_used(saved: Path) -> None:
    model = t.BertForSequenceClassification.from_pretrained(saved)
    summary = summarize(model, origin=saved)
    assert set(summary.unused) == {
        "cls.predictions.bias",
        "cls.predictions.transform.LayerNorm.bias",
        "cls.predictions.transform.LayerNorm.weight",
        "cls.predictions.transform.dense.bias",
        "cls.predictions.transform.dense.weight",
    }
    assert "5 keys of the checkpoint aren't used: cls.predictions.bias" in str(summary)
    assert all(name in summary.to_text("parameter") for name in summary.unused)
    assert json.loads(json.dumps(summary.to_dict()))["unused"] == list(summary.unused)


def test_the_table_of_a_comparison(saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    model = t.BertForSequenceClassification.from_pretrained(saved)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.add_(1)
    reinit(model, "layer.0.attention.self.query", seed=1)
    (tmp_path / "pretrained").symlink_to(saved)
    summary = summarize(model, origin="pretrained")
    assert_golden("origin/compared-groups.txt", str(summary))
    assert_golden("origin/compared-parameters.txt", summary.to_text("parameter"))


@pytest.mark.parametrize("names", [1, 2])
def test_tied_weights_stored_under_one_name_or_two(
    masked_lm: nn.Module, tmp_path: Path, names: int
) -> None:
    weights = dict(masked_lm.state_dict())
    if names == 1:
        del weights["cls.predictions.decoder.weight"], weights["cls.predictions.decoder.bias"]
    path = save(tmp_path / "pytorch_model.bin", weights)
    summary = summarize(masked_lm, origin=path)
    assert set(of(summary).values()) == {"loaded"}
    assert summary.unused == ()


def test_tied_weights_stored_under_the_other_name(masked_lm: nn.Module) -> None:
    weights = dict(masked_lm.state_dict())
    del weights["bert.embeddings.word_embeddings.weight"]
    row = rows(masked_lm, weights)["bert.embeddings.word_embeddings.weight"]
    assert (row.origin, row.checkpoint_key) == ("loaded", "cls.predictions.decoder.weight")


def test_a_checkpoint_without_the_tie_tells_which_of_its_two_tensors_it_is() -> None:
    model = tiny_bert_lm(2)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["cls.predictions.decoder.weight"] += 1
    row = rows(model, weights)["bert.embeddings.word_embeddings.weight"]
    assert (row.origin, row.checkpoint_key) == ("loaded", "bert.embeddings.word_embeddings.weight")


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_first_names_of_layer_norms(saved: Path, tmp_path: Path, wrapped: bool) -> None:
    weights = load_file(saved / "model.safetensors")
    legacy = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
        for name, tensor in weights.items()
    }
    save_file(legacy, tmp_path / "old.safetensors")
    model: nn.Module = t.BertForMaskedLM.from_pretrained(saved)
    if wrapped:
        model = nn.ModuleDict({"net": model})
    summary = summarize(model, origin=tmp_path / "old.safetensors")
    assert set(of(summary).values()) == {"loaded"}
    assert summary.unused == ()


def test_the_first_names_of_layer_norms_in_a_module_of_ones_own() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1))
    weights = {n: w.clone() for n, w in model.state_dict().items()}
    weights["1.gamma"], weights["1.beta"] = weights.pop("1.weight"), weights.pop("1.bias")
    assert rows(model, weights)["1.weight"].checkpoint_key == "1.gamma"
    assert counts(model, weights) == {"loaded": 6}


def test_shards_by_an_index(masked_lm: t.PreTrainedModel, tmp_path: Path) -> None:
    masked_lm.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert counts(masked_lm, tmp_path) == {"loaded": 42}
    assert "index" in str(summarize(masked_lm, origin=tmp_path))


def test_tensors_that_transformers_stacks_are_loaded_and_not_called_new(tmp_path: Path) -> None:
    config = t.MixtralConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        vocab_size=50,
        num_local_experts=2,
    )
    t.MixtralForCausalLM(config).save_pretrained(tmp_path)
    model = t.MixtralForCausalLM.from_pretrained(tmp_path)
    summary = summarize(model, origin=tmp_path)
    found = of(summary)
    assert any("experts" in name for name in found)
    assert set(found.values()) == {"loaded"}
    assert "loaded (not compared)" in summary.to_text("parameter")
    assert "which `from_pretrained` loaded all the same" in str(summary)
    # nobody can say by names which of its keys were used
    assert summary.unused == ()


# dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_loaded_if_it_is_converted_exactly(dtype: torch.dtype) -> None:
    stored = {name: w.to(dtype) for name, w in nn.Linear(4, 4).state_dict().items()}
    model = nn.Linear(4, 4)
    model.load_state_dict(stored)
    found = rows(model, stored)["weight"]
    assert (found.origin, found.origin_detail) == ("loaded", f"from {str(dtype)[6:]}")
    with torch.no_grad():
        model.weight[0, 0] = torch.nextafter(model.weight[0, 0], torch.tensor(9.0))
    assert states(model, stored)["weight"] == "changed since"
    assert states(model, stored)["bias"] == "loaded"


def test_a_model_in_half_precision_of_a_file_in_full(minilm: str) -> None:
    model = t.BertModel.from_pretrained(minilm, dtype=torch.bfloat16)
    summary = summarize(model, origin=minilm)
    assert set(of(summary).values()) == {"loaded"}
    assert "loaded (from float32)" in summary.to_text("parameter")


# Plain modules, wrappers, Lightning, PEFT, timm


def test_a_state_dict_with_another_head() -> None:
    old, model = Net(5), Net(2)
    weights = old.state_dict()
    weights["old_head.weight"] = torch.zeros(1)
    model.body.load_state_dict(old.body.state_dict())
    summary = summarize(model, origin=weights)
    assert of(summary)["body.0.weight"] == "loaded"
    assert of(summary)["head.weight"] == "other shape"
    assert summary.rows[-1].origin_detail == "5 in the checkpoint"
    assert summary.unused == ("old_head.weight",)
    assert "1 key of the checkpoint isn't used: old_head.weight" in str(summary)


def test_batch_norm_statistics_that_moved_are_told(tmp_path: Path) -> None:
    model = Net()
    path = save(tmp_path / "net.pt", model.state_dict())
    assert set(summarize(model, origin=path).buffers.values()) == {"loaded"}
    model.body.train()(torch.ones(2, 3))
    summary = summarize(model, origin=path)
    assert set(summary.buffers.values()) == {"changed since"}
    assert set(of(summary).values()) == {"loaded"}
    assert "Buffers: 3 changed since." in str(summary)
    assert "  body.1.running_mean: changed since" in summary.to_text("parameter")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_what_wrappers_put_into_names(tmp_path: Path, prefix: str) -> None:
    model = Net()
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    path = save(tmp_path / "net.pt", weights)
    summary = summarize(model, origin=path)
    assert set(of(summary).values()) == set(summary.buffers.values()) == {"loaded"}
    assert summary.unused == ()


def test_a_compiled_and_parallel_model_and_a_plain_file() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    assert set(states(nn.DataParallel(compiled), model.state_dict()).values()) == {"loaded"}


def test_a_lightning_checkpoint_before_and_after_a_fit(tmp_path: Path) -> None:
    model = seeded(Toy)
    fit = trainer(epochs=1)
    fit.fit(model, loader())
    fit.save_checkpoint(tmp_path / "run.ckpt")
    assert set(states(model, tmp_path / "run.ckpt").values()) == {"loaded"}
    found = states(seeded(Toy), tmp_path / "run.ckpt")
    assert "changed since" in found.values()
    assert "new" not in found.values()


def test_a_lightning_checkpoint_with_the_model_inside(tmp_path: Path) -> None:
    model = tiny_bert(2)
    content = {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
    }
    path = save(tmp_path / "run.ckpt", content)
    assert set(states(model, path).values()) == {"loaded"}
    assert set(states(nn.ModuleDict({"net": model}), path).values()) == {"loaded"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapted_model_and_the_weights_it_began_with(saved: Path) -> None:
    peft = pytest.importorskip("peft")
    base = t.BertForSequenceClassification.from_pretrained(saved)
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = peft.get_peft_model(base, config)
    found = states(model, saved)
    layer = "base_model.model.bert.encoder.layer.0.attention.self"
    assert found[f"{layer}.query.base_layer.weight"] == found[f"{layer}.key.weight"] == "loaded"
    assert found[f"{layer}.query.lora_A.default.weight"] == "new"
    assert found["base_model.model.classifier.original_module.weight"] == "new"
    assert summarize(model, origin=saved).unused == summarize(base, origin=saved).unused


def test_a_timm_model_with_a_file(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    old = timm.create_model("resnet18", num_classes=5)
    path = save(tmp_path / "resnet18.pth", old.state_dict())
    model = timm.create_model("resnet18", num_classes=2, checkpoint_path="")
    model.load_state_dict(
        {name: w for name, w in old.state_dict().items() if not name.startswith("fc")}, strict=False
    )
    summary = summarize(model, origin=path)
    assert {n for n, state in of(summary).items() if state == "other shape"} == {
        "fc.weight",
        "fc.bias",
    }
    assert set(summary.buffers.values()) == {"loaded"}


def test_the_part_that_a_checkpoint_belongs_to(tmp_path: Path) -> None:
    model = nn.ModuleDict({"student": Net(), "teacher": Net()})
    path = save(tmp_path / "net.pt", model["teacher"].state_dict())
    with pytest.raises(VerifyError, match=r"several places.*Say which one you mean by its path"):
        summarize(model, origin=path)
    found = states(model, {"teacher": path})
    assert found["teacher.head.weight"] == "loaded"
    assert found["student.head.weight"] == "unknown"
    both = states(model, {"teacher": path, "student": path})
    assert both["student.head.weight"] == "changed since"


def test_several_checkpoints_one_for_each_part(tmp_path: Path) -> None:
    model = Net()
    body = save(tmp_path / "body.pt", {f"body.{n}": w for n, w in model.body.state_dict().items()})
    head = {f"head.{name}": tensor for name, tensor in model.head.state_dict().items()}
    assert new_ones(model, body) == {"head.weight", "head.bias"}
    parts = {"body": model.body.state_dict(), "head": head}
    assert set(states(model, parts).values()) == {"loaded"}
    assert states(model, {"head": head})["body.0.weight"] == "unknown"


def test_a_model_without_bytes_is_told_by_names(saved: Path) -> None:
    with torch.device("meta"):
        model = t.BertForSequenceClassification(t.BertConfig.from_pretrained(saved))
    found = states(model, saved)
    assert found["bert.embeddings.LayerNorm.weight"] == "in the checkpoint"
    assert found["classifier.weight"] == "new"


def test_a_tensor_that_is_loaded_from_elsewhere(saved: Path, tmp_path: Path) -> None:
    t.BertForSequenceClassification.from_pretrained(saved).save_pretrained(tmp_path)
    model = t.BertForSequenceClassification.from_pretrained(tmp_path)
    assert states(model, tmp_path)["classifier.weight"] == "loaded"
    row = rows(model, saved)["classifier.weight"]
    assert (row.origin, row.origin_detail) == ("loaded", "not compared")


def test_nothing_is_changed_by_asking(saved: Path) -> None:
    model = t.BertForSequenceClassification.from_pretrained(saved)
    before = [(p._version, p.requires_grad, p.clone()) for p in model.parameters()]
    str(summarize(model, origin=saved))
    for parameter, (version, flag, value) in zip(model.parameters(), before):
        assert (parameter._version, parameter.requires_grad) == (version, flag)
        assert torch.equal(parameter, value)


# Wrong questions


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match=r"nothing\.pt"):
        summarize(Net(), origin=tmp_path / "nothing.pt")


def test_a_file_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="no tensors"):
        summarize(Net(), origin=save(tmp_path / "empty.pt", {}))
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(VerifyError, match="no tensors"):
        summarize(Net(), origin=tmp_path / "empty.safetensors")
    with pytest.raises(ArgumentError, match="`origin` is an empty dict"):
        summarize(Net(), origin={})
    with pytest.raises(ArgumentError, match="`origin` is of type list"):
        summarize(Net(), origin=["net.pt"])


def test_a_file_of_another_model(saved: Path, tmp_path: Path) -> None:
    text = f"`{saved}` and the model are different models"
    with pytest.raises(VerifyError, match=re.escape(text)):
        summarize(Net(), origin=saved)


def test_names_of_which_few_fit_are_another_model() -> None:
    model = Net()
    weights = {f"other.{i}": torch.zeros(1) for i in range(20)}
    weights["body.0.weight"] = model.body[0].weight.detach()
    with pytest.raises(VerifyError, match="different models"):
        summarize(model, origin=weights)


def test_names_of_which_half_fit_are_told_one_by_one() -> None:
    model = Net()
    weights = {n: w for n, w in model.state_dict().items() if "body" in n}
    weights |= {f"other.{i}": torch.zeros(1) for i in range(len(weights))}
    summary = summarize(model, origin=weights)
    assert of(summary)["body.0.weight"] == "loaded"
    assert of(summary)["head.weight"] == "new"
    assert summary.unused == tuple(f"other.{i}" for i in range(9))


def test_the_path_of_a_file_cannot_act_on_a_terminal(tmp_path: Path) -> None:
    model = Net()
    path = save(tmp_path / "net\x1b[2J\n.pt", model.state_dict())
    text = str(summarize(model, origin=path))
    assert "\x1b" not in text
    assert r"net\x1b[2J\n.pt (state dict, 11 tensors)" in text


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "code.pt", {"weights": nn.Linear(1, 1)})
    with pytest.raises(VerifyError, match="was refused"):
        summarize(nn.Linear(1, 1), origin=path)


@pytest.mark.parametrize("wrong", [3, nn.Linear(1, 1), {"lr": 0.1}, "nothing/here"])
def test_something_else_than_a_checkpoint(wrong: Any) -> None:
    with pytest.raises((ArgumentError, VerifyError), match=r"`origin` is|no tensors|nothing/here"):
        summarize(Net(), origin=wrong)


def test_a_part_that_is_not_there(tmp_path: Path) -> None:
    path = save(tmp_path / "net.pt", Net().state_dict())
    with pytest.raises(ArgumentError, match=r"`origin` names `tail`.*`body`, `head`"):
        summarize(Net(), origin={"tail": path})


def test_a_copy_of_a_model_is_compared_all_the_same(saved: Path) -> None:
    model = copy.deepcopy(t.BertForMaskedLM.from_pretrained(saved))
    assert set(states(model).values()) == {"unknown"}
    assert set(states(model, saved).values()) == {"loaded"}
