"""`GradualFreeze` in a fit: equal to a loop by hand, exact on a resume, memory back at once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_freeze import (
    ArgumentError,
    ConflictError,
    DiscoveryError,
    FreezeBackbone,
    GradualFreeze,
    ResumeError,
    ScheduleError,
    SelectorError,
    TrainableParamAudit,
)
from tests.callbacks.recipes import OPTIMIZERS
from tests.callbacks.test_oracle_refreezing import configure
from tests.callbacks.test_oracle_resume import assert_equal, everything
from tests.toys import Block, ByStep, FixedDropout, Toy, changed, loader, seeded, state, trainer

EPOCHS, PER_EPOCH = 5, 4
BLOCKS = ["backbone.blocks.0", "backbone.blocks.1", "backbone.blocks.2"]
BODY = ["backbone.embed", *BLOCKS]

KINDS: dict[str, Callable[[], GradualFreeze]] = {
    "clock": GradualFreeze,
    "steps": lambda: GradualFreeze(start=3, every=5, unit="step"),
    "written": lambda: GradualFreeze({1: ["embed", "blocks.1"], 3: {"freeze": "blocks.*"}}),
    "autofreeze": lambda: GradualFreeze.autofreeze(percentile=80),
    "autofreeze by steps": lambda: GradualFreeze.autofreeze(every=3, unit="step"),
}


class Rule:
    """AutoFreeze by hand: numpy, and lists of norms."""

    def __init__(self, every: int, percentile: float) -> None:
        self.every, self.percentile = every, percentile
        self.norms: list[list[float]] = []
        self.before: Any = None
        self.count = 0

    def at(self, step: int) -> list[str]:
        if step % self.every == 0 and self.norms:
            now = np.mean(np.array(self.norms), axis=0)
            self.norms = []
            if self.before is not None:
                ratio = np.abs(now - self.before) / np.maximum(self.before, 1e-30)
                threshold = np.percentile(ratio[self.count :], self.percentile)
                while ratio[self.count] < threshold:
                    self.count += 1
            self.before = now
        return BODY[: self.count]

    def see(self, model: nn.Module) -> None:
        modules = [model.get_submodule(name) for name in BODY]
        grads = [[p.grad for p in m.parameters() if p.grad is not None] for m in modules]
        self.norms.append([sum(float(g.norm()) ** 2 for g in own) ** 0.5 for own in grads])


def frozen_at(kind: str, step: int) -> list[str]:
    epoch = step // PER_EPOCH
    if kind == "clock":
        return BODY[:epoch]
    if kind == "steps":
        return BODY[: 0 if step < 3 else 1 + (step - 3) // 5]
    if epoch < 3:
        return [BODY[0], BODY[2]] if epoch else []
    return BODY


def by_hand(optimizer_name: str, kind: str) -> tuple[Toy, list[int]]:
    """Flags, modes and a new optimizer with the old state at each step."""
    rule = Rule(PER_EPOCH, 80) if kind == "autofreeze" else Rule(3, 50)
    model = seeded(Toy)
    model.train()
    state_of: dict[nn.Parameter, dict[str, Any]] = {}
    counts = []
    for step in range(EPOCHS * PER_EPOCH):
        frozen = rule.at(step) if kind.startswith("auto") else frozen_at(kind, step)
        counts.append(len(frozen))
        for name, parameter in model.named_parameters():
            parameter.requires_grad = not any(name.startswith(f"{part}.") for part in frozen)
            parameter.grad = None
        for module in model.modules():
            if isinstance(module, Block):
                module.train(module.linear.weight.requires_grad)
        optimizer = OPTIMIZERS[optimizer_name](model)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.9**step
            group["params"] = [p for p in group["params"] if p.requires_grad]
            optimizer.state.update((p, state_of[p]) for p in group["params"] if p in state_of)
        torch.manual_seed(1000 + step)
        batch = list(loader())[step % PER_EPOCH]
        model.loss(batch).backward()
        rule.see(model)
        optimizer.step()
        state_of = dict(optimizer.state)
    return model, counts


class Watch(Callback):
    """What is frozen, and what it still holds, as each batch ends."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.held: list[str] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        frozen = [n for n in BODY if not next(module.get_submodule(n).parameters()).requires_grad]
        self.counts.append(len(frozen))
        for name in frozen:
            for p in module.get_submodule(name).parameters():
                if p.grad is not None or any(p in o.state for o in trainer.optimizers):
                    self.held.append(name)


def fit(
    kind: str, optimizer: str = "AdamW", save: ModelCheckpoint | None = None, **resume: Any
) -> tuple[Any, Toy, Watch]:
    model = seeded(lambda: ByStep(configure(optimizer)))
    audit = TrainableParamAudit(table=False, dead_after=2, every="batch")
    watch = Watch()
    callbacks = [KINDS[kind](), audit, watch, FixedDropout(), *([save] if save else [])]
    run = trainer(*callbacks, epochs=EPOCHS, enable_checkpointing=save is not None)
    run.fit(model, loader(), **resume)
    assert audit.findings == []
    assert watch.held == []
    return run, model, watch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_a_run_is_that_of_a_loop_by_hand(kind: str, optimizer: str) -> None:
    model, counts = by_hand(optimizer, kind)
    _, ours, watch = fit(kind, optimizer)
    assert watch.counts == counts
    assert changed(state(model), state(ours)) == set()
    # control: it freezes something, but not from the start, and it isn't what another kind does
    assert counts[0] == 0
    assert 0 < counts[-1] <= 4 - kind.startswith("auto")
    other = "clock" if kind != "clock" else "written"
    assert changed(state(model), state(by_hand(optimizer, other)[0])) != set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_exact_after_a_resume(tmp_path: Path, kind: str) -> None:
    steps = ModelCheckpoint(
        tmp_path, filename="{step:02d}", save_top_k=-1, every_n_train_steps=2,
        save_on_train_epoch_end=False,
    )  # fmt: skip
    run, model, watch = fit(kind, save=steps)
    whole, weights = everything(run, model), state(model)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 10  # inside epochs and at their last batches
    for path in paths[:-1]:
        again, resumed, seen = fit(kind, ckpt_path=path)
        assert seen.counts == watch.counts[-len(seen.counts) :]
        assert changed(weights, state(resumed)) == set()
        assert_equal(whole, everything(again, resumed))


def test_a_resume_from_each_epochs_end_is_exact(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    _, model, watch = fit("autofreeze", save=save)
    for epoch in range(EPOCHS - 1):
        _, resumed, seen = fit("autofreeze", ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert seen.counts == watch.counts[PER_EPOCH * (epoch + 1) :]
        assert changed(state(model), state(resumed)) == set()


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 1e-3},
        {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
    ],
)
def test_norms_are_those_before_clipping_of_whole_steps(options: dict[str, Any]) -> None:
    seen: list[list[float]] = []

    class See(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            own = [module.get_submodule(name).parameters() for name in BODY]
            seen.append([float(sum(p.grad.double().norm() ** 2 for p in m) ** 0.5) for m in own])

    callback = GradualFreeze.autofreeze(every=9)
    run = trainer(callback, See(), epochs=2, **options)
    run.fit(seeded(Toy), loader())
    saved = callback.state_dict()["gradient"]
    steps = 8 // options.get("accumulate_grad_batches", 1)
    assert saved["steps"] == [float(steps)] * 4 == [float(len(seen))] * 4
    found = np.array(saved["totals"])
    coarse = options.get("precision") == "bf16-true"
    assert found == pytest.approx(np.sum(seen, axis=0), rel=2e-2 if coarse else 1e-5)
    assert found.max() > 1e-2  # clipped, they would be below


class Manual(Toy):
    """Two optimizers, stepped by hand; the second holds the top block and the head."""

    raw = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        optimizers: Any = self.optimizers(use_pl_optimizer=not self.raw)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        top = [*self.backbone.blocks[2].parameters(), *self.head.parameters()]
        low = [p for p in self.backbone.parameters() if all(p is not t for t in top)]
        return [torch.optim.SGD(low, lr=0.1), torch.optim.SGD(top, lr=0.1)]


def test_manual_optimisation_with_two_optimizers_counts_each_layer_once() -> None:
    callback = GradualFreeze.autofreeze(percentile=100)
    audit = TrainableParamAudit(table=False, every="batch")
    trainer(callback, audit, Watch(), epochs=3).fit(model := seeded(Manual), loader())
    saved = callback.state_dict()["gradient"]
    frozen = saved["frozen"]
    assert saved["steps"] == [0.0] * frozen + [4.0] * (4 - frozen)
    assert 0 < frozen < 4
    assert not model.backbone.embed.weight.requires_grad
    assert audit.findings == []


def test_gradients_that_lightning_never_sees_are_told_of() -> None:
    class Raw(Manual):
        raw = True

    with pytest.warns(UserWarning, match="has read no gradient for a whole interval"):
        trainer(GradualFreeze.autofreeze()).fit(seeded(Raw), loader())


def test_what_the_user_froze_does_not_count_and_stays_frozen() -> None:
    model = seeded(Toy)
    for p in model.backbone.embed.parameters():
        p.requires_grad = False
    before = state(model)
    callback = GradualFreeze.autofreeze(percentile=100)
    trainer(callback, FreezeBackbone("blocks.0.norm"), epochs=4).fit(model, loader())
    moved = changed(before, state(model))
    assert not {name for name in moved if "embed" in name or "blocks.0.norm" in name}
    assert callback.state_dict()["gradient"]["previous"][0] is None
    assert 1 < callback.state_dict()["gradient"]["frozen"] < 4


def test_what_another_callback_unfreezes_later_is_measured_from_then_on() -> None:
    callback = GradualFreeze.autofreeze(percentile=100)
    counts = []

    class See(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            counts.append(callback.state_dict()["gradient"]["frozen"])

    model = seeded(ByStep)
    callbacks = [FreezeBackbone(unfreeze_at_epoch=2), callback, See(), FixedDropout()]
    trainer(*callbacks, epochs=6).fit(model, loader())  # warnings are errors
    assert counts[:4] == [0] * 4  # epochs 2 and 3 are the first to be compared
    assert 0 < counts[-1] < 4
    assert not model.backbone.embed.weight.requires_grad


def test_a_second_fit_begins_anew_and_a_copy_goes_on_its_own() -> None:
    callback = GradualFreeze.autofreeze(percentile=90)
    ends = []
    for _ in range(2):
        model = seeded(ByStep)
        trainer(callback, FixedDropout(), epochs=4).fit(model, loader())
        ends.append((state(model), callback.state_dict()["gradient"]))
    assert changed(ends[0][0], ends[1][0]) == set()
    assert ends[0][1] == ends[1][1]
    assert ends[0][1]["frozen"] > 0
    assert pickle.loads(pickle.dumps(callback)).state_key == callback.state_key
    assert copy.deepcopy(callback).state_dict() == {}


def test_the_head_never_freezes_and_everything_below_does() -> None:
    model = seeded(Toy)
    trainer(GradualFreeze(start=0, layers_per_step=99), epochs=1).fit(model, loader())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "head.weight", "head.bias",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: GradualFreeze(monitor="val_loss"), ArgumentError, '`monitor` is .* Write "grad'),
        (lambda: GradualFreeze(monitor="gradient", start=2), ArgumentError, "`start` has no mean"),
        (lambda: GradualFreeze({1: "x"}, monitor="gradient"), ArgumentError, "`schedule` has no"),
        (lambda: GradualFreeze(percentile=60), ArgumentError, "`percentile` is for `monitor"),
        (lambda: GradualFreeze.autofreeze(percentile=0), ArgumentError, "number above 0, at most"),
        (lambda: GradualFreeze.autofreeze(percentile="x"), ArgumentError, "`percentile` is 'x'"),
        (lambda: GradualFreeze.autofreeze(every=0), ArgumentError, "`every` is 0"),
        (lambda: GradualFreeze(unit="steps"), ArgumentError, "`unit` is 'steps'"),
        (lambda: GradualFreeze(3), ArgumentError, "`schedule` is 3"),
        (lambda: GradualFreeze(groups=[]), ArgumentError, r"`groups` is \[\]"),
        (lambda: GradualFreeze({1: {"unfreeze": "x"}}), ScheduleError, "everything trains at fi"),
        (lambda: GradualFreeze({9: "bakcbone"}), SelectorError, "Did you mean `backbone`"),
        (lambda: GradualFreeze({9: "**"}), ConflictError, "Nothing is left to train from epoch 9"),
        (lambda: GradualFreeze({0: "**"}), ConflictError, "Nothing is left to train at the start"),
        (lambda: GradualFreeze({1: "embed", 2: "embed"}), ScheduleError, "it is frozen since 1"),
        (
            lambda: GradualFreeze(monitor="gradient", groups=["backbone", "head"]),
            DiscoveryError,
            "The model has 2 layer groups, so .* it takes 3",
        ),
    ],
)
def test_what_is_wrong_is_told_before_the_first_batch(
    make: Callable[[], GradualFreeze], error: type[Exception], match: str
) -> None:
    model = seeded(Toy)
    before = state(model)
    with pytest.raises(error, match=match):
        trainer(make()).fit(model, loader())
    assert changed(before, state(model)) == set()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("first", ["clock", "autofreeze by steps"])
def test_a_resume_with_another_clock_goes_by_the_new_one(tmp_path: Path, first: str) -> None:
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(KINDS[first](), save, epochs=3, enable_checkpointing=True).fit(seeded(Toy), loader())
    model = seeded(Toy)
    run = trainer(GradualFreeze(start=9), epochs=4)
    run.fit(model, loader(), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert all(p.requires_grad for p in model.parameters())


def test_a_resume_without_the_state_of_the_rule_is_refused(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(KINDS["clock"](), save, epochs=3, enable_checkpointing=True).fit(seeded(Toy), loader())
    with pytest.raises(ResumeError, match=r"lacks `gradient\.interval`"):
        trainer(GradualFreeze.autofreeze(), epochs=4).fit(
            seeded(Toy), loader(), ckpt_path=tmp_path / "epoch=2.ckpt"
        )


def test_the_preview_says_what_freezes_when() -> None:
    found = GradualFreeze(layers_per_step=2).preview(Toy(), max_epochs=2)
    assert [(row.at, len(row.frozen), row.reached) for row in found.rows] == [
        (0, 0, True), (1, 2, True), (2, 2, False),
    ]  # fmt: skip
    assert found.rows[0].trainable == found.total
    assert found.rows[-1].trainable == 8 * 3 + 3
    text = str(found)
    assert "freezes" in text
    assert "unfreezes" not in text
    by_gradient = GradualFreeze.autofreeze().preview(Toy(), max_epochs=2)
    assert [row.at for row in by_gradient.rows] == [0, 1, 2, 3]
    assert by_gradient.unit == "metric"
