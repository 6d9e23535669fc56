"""F20, F21, F24 to F27: parts of a model that a freeze misses, or that move although frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm
from transformers import ViTConfig, ViTModel

from lightning_freeze import FreezeBackbone, SelectorError, fingerprint, freeze
from tests.catalogue.harness import Do, audited, by_hand, fitted, inside, one, row
from tests.toys import Toy, changed, loader, seeded, state, trainer

WEIGHT = "backbone.blocks.0.linear.weight"


# F20


class VisionModel(Toy):
    """A vision transformer: its class token and positions hang from a module with children."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 8, "intermediate_size": 16, "image_size": 8, "patch_size": 4}
        config = ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
        self.backbone = ViTModel(config, add_pooling_layer=False).train()

    def forward(self, x: Tensor) -> Tensor:
        images = x.repeat(1, 48).view(-1, 3, 8, 8)
        return self.head(self.backbone(images).last_hidden_state[:, 0])


class FreezesLeaves(Callback):
    """What Lightning's own callback did up to 1.3: it froze modules without children."""

    def setup(self, trainer: Trainer, module: Any, stage: str) -> None:
        for leaf in module.backbone.modules():
            if not list(leaf.children()):
                leaf.requires_grad_(False)


@row("F20", prevented="parameters are walked, not the leaves among modules")
def test_f20_parameters_of_modules_with_children_freeze_with_the_backbone() -> None:
    assert inside(fitted(seeded(VisionModel), FreezesLeaves())) == {
        "backbone.embeddings.cls_token",
        "backbone.embeddings.position_embeddings",
    }
    model = seeded(VisionModel)
    assert fitted(model, FreezeBackbone()) == {"head.weight", "head.bias"}
    assert audited(seeded(VisionModel), FreezeBackbone()).findings == []


# F21


class Freezes(BaseFinetuning):
    """A strategy that takes what it freezes from an attribute, which may not be there."""

    def __init__(self, attribute: str) -> None:
        super().__init__()
        self.attribute = attribute

    def freeze_before_training(self, module: Any) -> None:
        self.freeze(list(getattr(module, self.attribute, nn.Module()).modules()))

    def finetune_function(self, *_: Any) -> None:
        pass


@row("F21", told="`SelectorError` before the fit, with the names that exist")
def test_f21_strategy_that_would_freeze_nothing_is_refused() -> None:
    assert WEIGHT in fitted(seeded(Toy), Freezes("bakbone"))  # control: not a word
    assert WEIGHT not in fitted(seeded(Toy), Freezes("backbone"))
    model = seeded(Toy)
    with pytest.raises(SelectorError, match=r"`bakbone`.*Did you mean `backbone`"):
        fitted(model, FreezeBackbone("bakbone"))
    assert fitted(model, FreezeBackbone("backbone")) == {"head.weight", "head.bias"}


# F24


class Flat(nn.Module):
    """As fairscale's `FlattenParamsWrapper`: one flat Parameter, of which the others are views."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        owners = [(m, key, p) for m in module.modules() for key, p in m._parameters.items()]
        self.flat_param = nn.Parameter(torch.cat([p.detach().flatten() for _, _, p in owners]))
        self.places = [(m, key, p.shape) for m, key, p in owners]
        for owner, key, _ in owners:
            del owner._parameters[key]

    def forward(self, x: Tensor) -> Tensor:
        parts = self.flat_param.split([shape.numel() for _, _, shape in self.places])
        for (owner, key, shape), part in zip(self.places, parts):
            setattr(owner, key, part.view(shape))
        return self.module(x)


class FlatModel(Toy):
    """Freezes its tower, which is flattened when the strategy wraps the model."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.requires_grad_(False)

    def configure_model(self) -> None:
        if not isinstance(self.backbone, Flat):
            self.backbone = Flat(self.backbone)


@row("F24", prevented="`FreezeBackbone` freezes after the wrap, and the flat parameter as a whole")
def test_f24_flat_parameter_is_frozen_whatever_flags_went_into_it() -> None:
    def weight_before_and_after(*callbacks: Callback) -> tuple[str, str]:
        model = seeded(FlatModel)
        before = fingerprint(model.backbone.embed.weight)
        trainer(*callbacks, epochs=1).fit(model, loader())
        return before, fingerprint(model.backbone.module.embed.weight)

    before, after = weight_before_and_after()  # control: the flags that the user set are gone
    assert before != after
    before, after = weight_before_and_after(FreezeBackbone())
    assert before == after
    assert audited(seeded(FlatModel), FreezeBackbone()).findings == []


# F25


class Spectral(Toy):
    """Two frozen layers with spectral norm, of the new kind and of the old."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations.spectral_norm(self.backbone.blocks[0].linear)
        spectral_norm(self.backbone.blocks[1].linear)


@row("F25", found="frozen-buffer-changed")
def test_f25_vectors_of_spectral_norm_that_move_are_told_from_running_statistics() -> None:
    model = by_hand(Spectral)
    for layer in (*model.backbone.blocks[:2], model.backbone.blocks[2].norm):
        layer.train()  # one batch-norm without spectral norm beside the two
    for block in model.backbone.blocks[:2]:
        block.norm.eval()
    spectral, statistics = audited(model).findings
    assert spectral.code == statistics.code == "frozen-buffer-changed"
    assert spectral.names == (
        "backbone.blocks.0.linear.parametrizations.weight.0._u",
        "backbone.blocks.0.linear.parametrizations.weight.0._v",
        "backbone.blocks.1.linear.weight_u",
        "backbone.blocks.1.linear.weight_v",
    )
    assert "Spectral norm estimates it anew in every forward pass" in spectral.cause
    assert {name.rpartition(".")[0] for name in statistics.names} == {"backbone.blocks.2.norm"}
    assert "batch-norm is in train mode" in statistics.cause
    assert audited(by_hand(Spectral)).findings == []  # control: in eval mode
    assert audited(seeded(Spectral), FreezeBackbone()).findings == []


# F26


class Normed(Toy):
    """A layer whose `weight` is computed from `g` and `v` (`original0`, `original1`)."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.backbone.blocks[0].linear)


@row("F26", prevented="what freezes and is compared is what is registered: `g` and `v`")
def test_f26_what_a_weight_is_computed_from_freezes_and_not_the_weight() -> None:
    registered = [f"backbone.blocks.0.linear.parametrizations.weight.original{i}" for i in (0, 1)]
    model = seeded(Normed)
    with torch.no_grad():
        assert not model.backbone.blocks[0].linear.weight.requires_grad  # it looks frozen
    assert inside(fitted(model)) >= set(registered)  # control
    with pytest.raises(SelectorError, match=r"linear` has: bias, parametrizations"):
        freeze(seeded(Normed), "backbone.blocks.0.linear.weight")
    assert fitted(seeded(Normed), FreezeBackbone()) == {"head.weight", "head.bias"}

    def write(trainer: Trainer, module: Any) -> None:
        module.get_parameter(registered[1]).data.mul_(1.001)  # `weight` stays as it was

    audit = audited(seeded(Normed), FreezeBackbone(), Do(at=6, on_train_batch_end=write))
    assert one(audit, "frozen-changed").names == (registered[1],)
    assert audited(seeded(Normed), FreezeBackbone()).findings == []


# F27


@row("F27", found="frozen-changed")
def test_f27_average_that_is_not_equal_to_its_frozen_source_is_named() -> None:
    if not hasattr(lightning_callbacks, "EMAWeightAveraging"):
        pytest.skip("EMAWeightAveraging came with Lightning 2.6")

    def write(trainer: Trainer, module: Any) -> None:
        module.backbone.embed.bias.data.add_(1)

    model = seeded(Toy)
    before = state(model)
    sabotage = Do(at=6, on_train_batch_end=write)  # another suspect
    average = lightning_callbacks.EMAWeightAveraging(decay=0.77)
    copy, written, put_back = audited(model, FreezeBackbone(), average, sabotage).findings
    assert {found.code for found in (copy, written, put_back)} == {"frozen-changed"}
    assert "that `EMAWeightAveraging` keeps" in copy.message
    assert "EMAWeightAveraging" in copy.cause
    assert written.names == ("backbone.embed.bias",)
    assert "EMAWeightAveraging" not in written.cause
    assert set(put_back.names) == inside(changed(before, state(model)))  # the fit's end
    assert "`EMAWeightAveraging` averages weights and writes the average back" in put_back.cause
    average = lightning_callbacks.WeightAveraging()  # control: exact where all are equal
    assert audited(seeded(Toy), FreezeBackbone(), average).findings == []
