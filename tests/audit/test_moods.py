"""Which modules mind whether they are in train or in eval mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm
from transformers import BertConfig, BertModel

from lightning_freeze.audit.moods import minds_its_mode


class Inside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


class InLambda(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (lambda y: y * 2 if self.training else y)(x)


class Inherits(Inside):
    pass


class Indifferent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


MINDS = {
    "dropout": nn.Dropout(0.1),
    "batch-norm": nn.BatchNorm1d(3),
    "instance norm with statistics": nn.InstanceNorm1d(3, track_running_stats=True),
    "attention with dropout": nn.MultiheadAttention(4, 2, dropout=0.1),
    "a recurrent layer with dropout": nn.LSTM(3, 3, 2, dropout=0.1),
    "a random activation": nn.RReLU(),
    "spectral norm": spectral_norm(nn.Linear(3, 3)),
    "a module of one's own": Inside(),
    "in a function inside": InLambda(),
    "by inheritance": Inherits(),
}
DOES_NOT = {
    "a linear layer": nn.Linear(2, 2),
    "dropout of nothing": nn.Dropout(0.0),
    "layer norm": nn.LayerNorm(3),
    "batch-norm without statistics": nn.BatchNorm1d(3, track_running_stats=False),
    "instance norm": nn.InstanceNorm1d(3),
    "attention": nn.MultiheadAttention(4, 2),
    "a recurrent layer": nn.LSTM(3, 3),
    "a container": nn.Sequential(nn.Dropout(0.1)),
    "a module of one's own": Indifferent(),
}


@pytest.mark.parametrize("case", MINDS)
def test_it_minds(case: str) -> None:
    assert minds_its_mode(MINDS[case])


@pytest.mark.parametrize("case", DOES_NOT)
def test_it_does_not(case: str) -> None:
    module = DOES_NOT[case]
    assert not minds_its_mode(module)
    if case == "a module of one's own":
        x = torch.randn(3)
        assert torch.equal(module.train()(x), module.eval()(x))


def test_without_dropout_a_bert_behaves_alike_where_nothing_minds() -> None:
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    shape = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
    bert = BertModel(BertConfig(num_hidden_layers=1, **shape, **none))
    ids = torch.arange(6).view(1, -1)
    outputs = [bert.train(mode)(ids).last_hidden_state for mode in (True, False)]
    assert torch.equal(*outputs)
    dropping = BertModel(BertConfig(num_hidden_layers=1, **shape))
    assert any(minds_its_mode(module) for module in dropping.modules())
