"""What looks wrong and is so by nature: no finding; each with the control that is one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam
from torch.optim.lr_scheduler import LambdaLR, LinearLR

from lightning_freeze import FreezeBackbone, SelectorError
from tests.catalogue.harness import Do, audited, by_hand, codes, one
from tests.toys import Toy, changed, loader, seeded, state

# A gradient of exactly zero


class Difference(Toy):
    """Its loss is a difference of two outputs: the last bias has a gradient of zero."""

    def __init__(self, loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__(lambda m: Adam((p for p in m.parameters() if p.requires_grad), lr=1e-3))
        self.head = nn.Linear(8, 1)
        self.of = loss

    def loss(self, batch: Any) -> Tensor:
        x, _ = batch
        return self.of(self(x) - self(x + 0.3))


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "a critic": lambda difference: difference.mean(),
    "a reward model": lambda difference: -nn.functional.logsigmoid(difference).mean(),
}


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("hand", [True, False])
def test_a_loss_of_differences_leaves_the_last_bias_where_it_is(case: str, hand: bool) -> None:
    make = lambda: Difference(LOSSES[case])  # noqa: E731
    model = by_hand(make) if hand else seeded(make)
    before = state(model)
    audit = audited(model, *([] if hand else [FreezeBackbone()]), epochs=3)
    assert audit.findings == []
    assert "head.weight" in changed(before, state(model))


def test_a_matrix_whose_gradient_is_zero_is_told() -> None:
    model = by_hand(lambda: Difference(LOSSES["a critic"]))
    model.head.weight.register_hook(torch.zeros_like)
    finding = one(audited(model, epochs=3), "not-updated")
    assert "head.weight" in finding.names
    assert finding.cause == "Its gradient is zero in every element."


# Gradients that are sparse, learning rates that begin at next to nothing


class Sparse(Toy):
    """An embedding whose gradient holds only the rows that were used."""

    def __init__(self, configure: Any = None) -> None:
        super().__init__(configure or (lambda m: SGD(m.parameters(), lr=0.1)))
        self.embedding = nn.Embedding(20, 8, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.abs().mul(5).long().clamp(max=19)
        return self.head(self.embedding(rows).mean(1) + self.backbone(x))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_sparse_gradient_is_read(frozen: bool) -> None:
    model = by_hand(Sparse)
    model.embedding.weight.requires_grad_(not frozen)
    assert audited(model, epochs=3).findings == []


def test_a_sparse_embedding_that_is_written_back_is_told() -> None:
    model = by_hand(Sparse)
    kept = model.embedding.weight.detach().clone()
    back = Do(on_train_batch_end=lambda _, module: module.embedding.weight.data.copy_(kept))
    finding = one(audited(model, back, epochs=4), "not-updated")
    assert finding.names == ("embedding.weight",)
    assert "some code writes it back" in finding.cause


def warmed(scheduler: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def configure(module: Any) -> Any:
        optimizer = SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
        return [optimizer], [scheduler(optimizer)]

    return configure


@pytest.mark.parametrize("make", [Toy, Sparse])
@pytest.mark.parametrize(
    "scheduler",
    [lambda o: LambdaLR(o, lambda epoch: epoch / 3), lambda o: LinearLR(o, 1e-8, 1.0, 3)],
    ids=["from zero", "from next to zero"],
)
def test_a_warm_up_by_epoch_is_waited_for(make: Any, scheduler: Any) -> None:
    assert audited(by_hand(lambda: make(warmed(scheduler))), epochs=3).findings == []


def test_a_learning_rate_that_stays_too_small_is_told() -> None:
    model = by_hand(lambda: Toy(lambda m: SGD(m.head.parameters(), lr=1e-12)))
    assert codes(audited(model, epochs=3)) == {"not-updated"}


# State that an optimizer makes for itself


def test_state_that_adagrad_is_born_with_is_no_leftover() -> None:
    model = by_hand(lambda: Toy(lambda m: Adagrad(m.parameters(), lr=0.1)))
    assert "stale-optimizer-state" not in codes(audited(model))


def test_state_of_what_was_stepped_is_one() -> None:
    def configure(module: Any) -> Any:
        optimizer = Adagrad(module.parameters(), lr=0.1)
        weight = module.backbone.embed.weight
        optimizer.state[weight]["step"] += 1
        return optimizer

    finding = one(audited(by_hand(lambda: Toy(configure))), "stale-optimizer-state")
    assert finding.names == ("backbone.embed.weight",)


# Train mode that makes no difference


class Plain(Toy):
    """Nothing in its backbone minds whether it trains."""

    def __init__(self, dropout: float = 0.0, wakes: bool = True) -> None:
        super().__init__()
        self.wakes = wakes
        layers = nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 8)
        self.backbone = nn.Sequential(*layers)  # type: ignore[assignment]

    def on_train_start(self) -> None:
        if self.wakes:
            self.train()  # `from_pretrained` gave it in eval mode


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_train_mode_before_the_first_batch_is_told_only_where_it_matters(dropout: float) -> None:
    found = codes(audited(by_hand(lambda: Plain(dropout))))
    assert found == ({"mode-changed"} if dropout else set())


def test_train_mode_later_on_is_told_in_any_case() -> None:
    wake = Do(at=3, on_train_batch_start=lambda _, module: module.backbone.train())
    asleep = by_hand(lambda: Plain(wakes=False))
    assert codes(audited(asleep, wake)) == {"mode-changed"}


# Parts that nobody uses


def test_a_lazy_layer_that_is_never_used_is_passed_over() -> None:
    def make() -> Toy:
        model = Toy(lambda m: SGD(m.head.parameters(), lr=0.1))
        model.unused = nn.LazyLinear(3)
        return model

    model = by_hand(make)
    before = copy.deepcopy(model.head.state_dict())
    assert audited(model, epochs=3).findings == []
    assert changed(before, model.head.state_dict()) == {"weight", "bias"}


# Frozen for autograd, written by the module itself


class Momentum(Toy):
    """Its frozen twin follows what trains, as in MoCo, BYOL and DINO."""

    def __init__(self) -> None:
        super().__init__(lambda m: SGD([*m.backbone.parameters(), *m.head.parameters()], lr=0.1))
        self.twin = copy.deepcopy(self.backbone).requires_grad_(False)
        self.register_buffer("steps", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.steps += 1
            for ours, theirs in zip(self.twin.parameters(), self.backbone.parameters()):
                ours.lerp_(theirs, 0.1)
            wanted = self.twin(batch[0])
        return (
            super().training_step(batch, batch_idx)
            + (self.backbone(batch[0]) - wanted).pow(2).mean()
        )


@pytest.mark.parametrize("every", ["epoch", "batch", 3])
def test_a_momentum_encoder_is_left_out_on_request(every: str) -> None:
    audit = audited(seeded(Momentum), audit={"ignore": "twin", "every": every}, epochs=3)
    assert audit.findings == []
    twins = len(seeded(Momentum).twin.state_dict())
    assert audit.verdict.endswith(f" `ignore` leaves out {twins} tensors.")
    assert audit.to_dict()["ignored"] == twins


def test_without_a_request_it_is_told_and_the_fix_says_how_to_ask() -> None:
    audit = audited(seeded(Momentum))
    assert {"frozen-changed", "frozen-buffer-changed"} <= codes(audit)
    assert all(name.startswith("twin.") for f in audit.findings for name in f.names)
    fixes = {finding.fix for finding in audit.findings if finding.code == "frozen-changed"}
    assert all("name it in `ignore`" in fix for fix in fixes)


def test_what_is_left_out_does_not_hide_what_is_beside_it() -> None:
    write = Do(at=3, on_train_batch_end=lambda _, m: m.head.bias.data.add_(1))
    model = seeded(Momentum)
    model.configure = lambda m: SGD(m.backbone.parameters(), lr=0.1)
    model.head.requires_grad_(False)
    finding = one(audited(model, write, audit={"ignore": "twin"}), "frozen-changed")
    assert finding.names == ("head.bias",)


@pytest.mark.parametrize("leave", ["backbone.blocks.0.norm.running_*", "backbone.blocks.0"])
def test_buffers_are_left_out_by_their_own_names(leave: str) -> None:
    def write(_: Any, module: Any) -> None:
        module.backbone.blocks[0].norm.running_mean.add_(1)
        module.backbone.blocks[1].norm.running_mean.add_(1)

    sabotage = Do(at=3, on_train_batch_end=write)
    audit = audited(by_hand(Toy), sabotage, audit={"ignore": leave})
    finding = one(audit, "frozen-buffer-changed")
    assert finding.names == ("backbone.blocks.1.norm.running_mean",)


def test_what_is_left_out_may_be_switched_on_and_off() -> None:
    def switch(_: Any, module: Any) -> None:
        module.backbone.blocks[0].requires_grad_(True).train()

    sabotage = Do(at=3, on_train_batch_end=switch)
    assert audited(by_hand(Toy), sabotage, audit={"ignore": "backbone.blocks.0"}).findings == []
    found = codes(audited(by_hand(Toy), sabotage, audit={"ignore": "backbone.blocks.1"}))
    assert {"flag-changed", "mode-changed"} <= found


@pytest.mark.parametrize("callbacks", [(), (FreezeBackbone(),)], ids=["by hand", "managed"])
def test_a_selector_that_matches_nothing_is_refused_before_the_first_batch(
    callbacks: tuple[Callback, ...],
) -> None:
    model = seeded(Toy)
    before = state(model)
    with pytest.raises(SelectorError, match="bakcbone"):
        audited(model, *callbacks, audit={"ignore": "bakcbone"}, data=loader())
    assert changed(before, state(model)) == set()
    assert all(p.requires_grad for p in model.parameters())
