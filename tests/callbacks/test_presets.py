"""Presets: what a paper lets train moves, and everything else is the same to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_freeze import (
    ArgumentError,
    ConflictError,
    FreezeBackbone,
    GradualUnfreeze,
    SelectorError,
    TrainableParamAudit,
)
from tests.oracle import Oracle
from tests.toys import FixedDropout, Toy, changed, loader, seeded, state, trainer


class Normed(nn.Module):
    """A block with a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.ln_1 = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(self.ln_1(x)))


class WithLayerNorms(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.backbone.blocks = nn.ModuleList(Normed() for _ in range(3))


def moved(model: Any, *callbacks: Any, epochs: int = 2) -> set[str]:
    """Names of what a fit with an audit changed."""
    before = state(model)
    audit = TrainableParamAudit(table=False)
    trainer(*callbacks, audit, epochs=epochs).fit(model, loader())
    assert audit.findings == []
    return changed(before, state(model))


def names(model: nn.Module, *parts: str) -> set[str]:
    return {n for n in model.state_dict() if any(part in n for part in parts)}


HEAD = {"head.weight", "head.bias"}


def test_bitfit_moves_the_biases_and_the_head_alone() -> None:
    model = seeded(WithLayerNorms)
    expected = names(model, ".bias") | HEAD
    assert moved(model, FreezeBackbone.bitfit()) == expected
    assert len(expected) == 9


def test_bitfit_on_a_backbone_without_biases_is_told() -> None:
    model = seeded(WithLayerNorms)
    for module in model.backbone.modules():
        if hasattr(module, "bias"):
            module.bias = None
    with pytest.warns(UserWarning, match="nothing inside the backbone stays trainable"):
        assert moved(model, FreezeBackbone.bitfit()) == HEAD


def test_layer_norm_only_moves_layer_norms_and_the_head_alone() -> None:
    model = seeded(WithLayerNorms)
    expected = names(model, "ln_1") | HEAD
    assert moved(model, FreezeBackbone.layer_norm_only()) == expected
    assert len(expected) == 8
    with pytest.raises(SelectorError, match=r"`type:\*LayerNorm\*\|\*RMSNorm\*` names"):
        moved(seeded(Toy), FreezeBackbone.layer_norm_only())


@pytest.mark.parametrize("head", [True, False])
def test_batch_norm_only_moves_weights_and_statistics_of_batch_norms(head: bool) -> None:
    model = seeded(Toy)
    expected = names(model, ".norm.") | (HEAD if head else set())
    assert moved(model, FreezeBackbone.batch_norm_only(head=head)) == expected
    assert len(expected) == 15 + 2 * head


@pytest.mark.parametrize("block", ["blocks.0", "blocks.2", "backbone.embed"])
def test_surgical_fine_tuning_moves_one_block_alone(block: str) -> None:
    model = seeded(Toy)
    expected = names(model, f"{block}.")
    assert moved(model, FreezeBackbone.surgical(block)) == expected
    assert len(expected) in (2, 7)


def test_lp_ft_moves_the_head_first_and_the_backbone_at_a_lower_rate_then() -> None:
    assert moved(seeded(Toy), FreezeBackbone.lp_ft(epoch=2)) == HEAD
    model = seeded(Toy)
    assert moved(model, FreezeBackbone.lp_ft(epoch=1)) == set(model.state_dict())
    oracle = Oracle(lambda name: 0.2 if name.startswith("backbone") else 1.0)
    trainer(FreezeBackbone.lp_ft(1, 0.2), oracle, epochs=2).fit(model, loader())
    assert oracle.wrong == []


def distance(name: str) -> int:
    """Layer groups between a tensor and the top."""
    places = ("head", "blocks.2", "blocks.1", "blocks.0", "embed")
    return next(number for number, place in enumerate(places) if place in name)


def test_ulmfit_goes_down_one_group_an_epoch_with_lower_rates() -> None:
    model = seeded(Toy)
    assert moved(model, GradualUnfreeze.ulmfit()) == HEAD | names(model, "blocks.2")
    oracle = Oracle(lambda name: (1 / 2.6) ** distance(name))
    trainer(GradualUnfreeze.ulmfit(), oracle, epochs=5).fit(model, loader())
    assert oracle.wrong == []


def test_ulmfit_with_another_interval_begins_with_it() -> None:
    model = seeded(Toy)
    assert moved(model, GradualUnfreeze.ulmfit(every=2)) == HEAD


def test_layerwise_decay_trains_everything_from_the_start() -> None:
    model = seeded(Toy)
    assert moved(model, GradualUnfreeze.layerwise_lr_decay(0.5)) == set(model.state_dict())
    oracle = Oracle(lambda name: 0.95 ** distance(name))
    trainer(GradualUnfreeze.layerwise_lr_decay(), oracle, epochs=1).fit(model, loader())
    assert oracle.wrong == []


def test_layerwise_decay_leaves_what_the_user_froze() -> None:
    model = seeded(Toy)
    for parameter in model.backbone.embed.parameters():
        parameter.requires_grad = False
    left = set(model.state_dict()) - names(model, "embed")
    assert moved(model, GradualUnfreeze.layerwise_lr_decay()) == left


def test_lisa_draws_from_named_groups_and_trains_the_rest_always() -> None:
    model = seeded(Toy)
    pairs = [["backbone.embed", "blocks.0"], "blocks.1", "blocks.2"]
    once = GradualUnfreeze.lisa(1, every=99, seed=0, groups=pairs)  # one draw for the whole fit
    drawn = moved(model, once)
    assert drawn in (
        HEAD | names(model, "embed", "blocks.0"),
        HEAD | names(model, "blocks.1"),
        HEAD | names(model, "blocks.2"),
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradualUnfreeze.lisa(0), "`layers` is 0"),
        (lambda: GradualUnfreeze.lisa(every=0), "`every` is 0"),
        (lambda: GradualUnfreeze.lisa(seed=-1), "`seed` is -1"),
        (lambda: GradualUnfreeze.lisa(unit="batch"), "`unit` is 'batch'"),
        (lambda: GradualUnfreeze.chain_thaw(every=1.5), "`every` is 1.5"),  # type: ignore[arg-type]
        (lambda: FreezeBackbone.lp_ft(0), "`unfreeze_at_epoch` is 0"),
        (lambda: GradualUnfreeze.ulmfit(lr_decay=0), "`lr_decay` is 0"),
    ],
)
def test_a_wrong_argument_of_a_preset_is_refused_at_once(make: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_lisa_with_more_layers_than_there_are_is_refused_in_setup() -> None:
    with pytest.raises(ArgumentError, match=r"`layers=4` is beyond the 3 layers"):
        trainer(GradualUnfreeze.lisa(4)).fit(seeded(Toy), loader())


def test_lisa_and_a_frozen_embedding_go_together() -> None:
    model = seeded(Toy)
    expected = set(model.state_dict()) - names(model, "embed")
    lisa = GradualUnfreeze.lisa(2, every=1)
    assert moved(model, lisa, FreezeBackbone("backbone.embed"), epochs=6) == expected


def test_a_table_of_who_trains_is_shown_once_where_layers_are_drawn(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer(GradualUnfreeze.lisa(1, 2), TrainableParamAudit(), epochs=2).fit(seeded(Toy), loader())
    assert capsys.readouterr().out.count("who trains") == 1
    trainer(GradualUnfreeze(), TrainableParamAudit(), epochs=2).fit(seeded(Toy), loader())
    assert capsys.readouterr().out.count("who trains") == 2


@pytest.mark.parametrize("every", ["batch", 3])
def test_every_way_of_auditing_goes_with_random_layers(every: Any) -> None:
    audit = TrainableParamAudit(table=False, every=every)
    lisa = GradualUnfreeze.lisa(1, every=2)
    trainer(lisa, audit, epochs=4, accumulate_grad_batches=2).fit(seeded(Toy), loader())
    assert audit.findings == []
    drawn = [sum(lr is not None for lr in moment.lr.values()) for moment in audit._record.moments]
    assert set(drawn) == {3}  # what embeds, one block, the head
    assert len(drawn) == 4


def test_random_layers_that_leave_nothing_to_train_are_refused() -> None:
    with pytest.raises(ConflictError, match=r"contradict each other.*blocks\.0\.linear\.bias"):
        trainer(GradualUnfreeze.lisa(1, 2), FreezeBackbone()).fit(seeded(Toy), loader())
    both = (GradualUnfreeze.lisa(1, 2), GradualUnfreeze.chain_thaw())
    with pytest.raises(ConflictError, match="Nothing is left to train from epoch 2, step 8 on"):
        trainer(*both, epochs=6).fit(seeded(Toy), loader())


def test_the_same_preset_in_two_fits_draws_the_same() -> None:
    lisa = GradualUnfreeze.lisa(2, every=3, seed=1)
    ends = []
    for _ in range(2):
        model = seeded(Toy)
        trainer(lisa, FixedDropout()).fit(model, loader())
        ends.append(state(model))
    assert changed(*ends) == set()


def test_a_model_without_layers_is_told_to_name_them() -> None:
    model = seeded(Toy)
    model.backbone = nn.Linear(4, 8)
    with pytest.raises(ArgumentError, match="beyond the 0 layers that can be drawn"):
        trainer(GradualUnfreeze.lisa(1)).fit(model, loader())


def test_a_preset_can_be_pickled_and_previewed() -> None:
    import pickle

    for preset in (GradualUnfreeze.lisa(1, 2), GradualUnfreeze.chain_thaw()):
        again = pickle.loads(pickle.dumps(preset))
        assert again.state_key == preset.state_key
        rows = again.preview(seeded(Toy), max_epochs=6).rows
        assert rows[0].trainable < rows[-1].trainable or preset.unit == "step"
        assert len(rows) >= 6
