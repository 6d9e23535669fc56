"""Healthy kinds of run: the audit ends none of them, and says nothing of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    StochasticWeightAveraging,
)
from torch import Tensor, nn

from lightning_freeze import (
    AuditError,
    FreezeBackbone,
    GradualUnfreeze,
    ReinitTopLayers,
    TrainableParamAudit,
    assert_frozen,
    audit_parameters,
    freeze,
)
from lightning_freeze.audit.run import AuditRun
from tests.toys import Toy, changed, loader, seeded, state, trainer

Run = tuple[Callable[[], Toy], Callable[[], list[Callback]], dict[str, Any]]


class At(Callback):
    """Does something in one hook of the fit: `At("on_fit_start", act)`, in epoch `epoch`."""

    def __init__(self, hook: str, act: Callable[[Any], Any], epoch: int = 0) -> None:
        def run(trainer: Any, module: Any, *rest: Any) -> None:
            if trainer.current_epoch == epoch:
                act(module)

        setattr(self, hook, run)


class InHook(Toy):
    """Freezes and unfreezes itself, in a hook of its own."""

    def __init__(self, hook: str, acts: dict[int, Callable[[Any], Any]]) -> None:
        super().__init__(lambda m: torch.optim.SGD(m.parameters(), lr=1e-2))

        def run() -> None:
            if self.current_epoch in acts:
                acts[self.current_epoch](self)

        setattr(self, hook, run)


class Lazy(Toy):
    """A lazy batch-norm without weights below the head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LazyBatchNorm1d(affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.backbone(x)))


class Accumulates(Toy):
    """Steps by hand, every third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch))
        if batch_idx % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()


class Codebook(Toy):
    """A buffer that a trainable module writes itself, as an observer or a queue does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.backbone(x)
        self.queue.copy_(hidden.detach().mean(0))
        return self.head(hidden)


class Teacher(Toy):
    """A momentum copy of the head, which requires no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(8, 3).requires_grad_(False)

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.head.parameters()):
                old.lerp_(new, 0.1)


def backbone(trains: bool) -> Callable[[Any], Any]:
    return lambda module: module.backbone.requires_grad_(trains)


def asleep(module: Any) -> None:
    module.backbone.requires_grad_(False).eval()


def by_hand() -> Toy:
    model = Toy(lambda m: torch.optim.SGD(m.parameters(), lr=1e-2))
    asleep(model)
    return model


def plain_norms(make: Callable[[], Toy] = Toy) -> Toy:
    """Without batch-norm, whose statistics move in train mode."""
    model = make()
    for block in model.backbone.blocks:
        block.norm = nn.LayerNorm(8)
    return model


def held_by_flag(model: Any) -> Any:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)


RUNS: dict[str, Run] = {
    "nothing frozen": (Toy, list, {}),
    "frozen before the fit": (by_hand, list, {}),
    "frozen in a callback's on_fit_start": (Toy, lambda: [At("on_fit_start", asleep)], {}),
    "frozen in a callback's on_train_start": (Toy, lambda: [At("on_train_start", asleep)], {}),
    "frozen in a callback's first epoch": (Toy, lambda: [At("on_train_epoch_start", asleep)], {}),
    "frozen in the module's on_fit_start": (lambda: InHook("on_fit_start", {0: asleep}), list, {}),
    "frozen in the module's on_train_start": (
        lambda: InHook("on_train_start", {0: asleep}),
        list,
        {},
    ),
    "frozen in the module's first epoch": (
        lambda: InHook("on_train_epoch_start", {0: asleep}),
        list,
        {},
    ),
    "frozen in the module's third epoch": (
        lambda: InHook("on_train_epoch_start", {2: asleep}),
        list,
        {},
    ),
    "unfrozen in the module's third epoch": (
        lambda: plain_norms(lambda: InHook("on_train_epoch_start", {0: asleep, 2: backbone(True)})),
        list,
        {},
    ),
    "unfrozen block by block": (
        lambda: plain_norms(
            lambda: InHook(
                "on_train_epoch_start",
                {
                    0: asleep,
                    1: lambda m: m.backbone.blocks[2].requires_grad_(True),
                    2: lambda m: m.backbone.blocks[1].requires_grad_(True),
                },
            )
        ),
        list,
        {},
    ),
    "unfrozen at an epoch's end": (
        by_hand,
        lambda: [At("on_train_epoch_end", backbone(True), 1)],
        {},
    ),
    "frozen and unfrozen at the module's epochs' ends": (
        lambda: plain_norms(lambda: InHook("on_train_epoch_end", {0: asleep, 1: backbone(True)})),
        list,
        {},
    ),
    "Lightning's BackboneFinetuning": (
        lambda: plain_norms(lambda: Toy(held_by_flag)),
        lambda: [BackboneFinetuning(2)],
        {},
    ),
    "FreezeBackbone": (Toy, lambda: [FreezeBackbone()], {}),
    "FreezeBackbone for a time": (Toy, lambda: [FreezeBackbone(unfreeze_at_epoch=1)], {}),
    "FreezeBackbone with lively batch-norm": (Toy, lambda: [FreezeBackbone(train_bn=True)], {}),
    "GradualUnfreeze": (Toy, lambda: [GradualUnfreeze()], {}),
    "GradualUnfreeze with falling rates": (Toy, lambda: [GradualUnfreeze(lr_decay=0.5)], {}),
    "a schedule by hand": (
        Toy,
        lambda: [GradualUnfreeze(schedule={0: "head", 2: "**"})],
        {},
    ),
    "a re-initialised top": (Toy, lambda: [ReinitTopLayers(1), GradualUnfreeze()], {}),
    "accumulated by Lightning": (Toy, lambda: [FreezeBackbone()], {"accumulate_grad_batches": 3}),
    "accumulated by hand": (Accumulates, lambda: [FreezeBackbone()], {}),
    "clipped": (Toy, lambda: [FreezeBackbone()], {"gradient_clip_val": 0.1}),
    "bfloat16": (Toy, lambda: [FreezeBackbone()], {"precision": "bf16-mixed"}),
    "several validations an epoch": (
        Toy,
        lambda: [FreezeBackbone()],
        {"val_check_interval": 0.5, "num_sanity_val_steps": 1},
    ),
    "no epoch's end": (Toy, lambda: [FreezeBackbone()], {"max_steps": 7}),
    "averaged by SWA": (
        lambda: plain_norms(lambda: Toy(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))),
        lambda: [FreezeBackbone(), StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)],
        {},
    ),
    "stopped early": (
        Toy,
        lambda: [FreezeBackbone(), EarlyStopping("val_loss", patience=0, min_delta=10.0)],
        {},
    ),
    "a lazy batch-norm without weights": (Lazy, lambda: [FreezeBackbone(trainable="re:norm")], {}),
    "a queue that the module writes": (Codebook, list, {}),
    "a momentum teacher under ignore": (Teacher, lambda: [FreezeBackbone()], {"ignore": "teacher"}),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_healthy_run_is_neither_ended_nor_told_of(case: str) -> None:
    make, callbacks, options = RUNS[case]
    options = dict(options)
    audit = TrainableParamAudit(table=False, every="batch", ignore=options.pop("ignore", ()))
    model = seeded(make)
    model(torch.ones(2, 4))  # lazy layers know their shape before a copy is made
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(*callbacks(), audit, epochs=4, **options).fit(model, loader(), loader(seed=2))
    assert audit.findings == []
    assert audit.verdict.startswith("Audit: clean in ")
    assert {"head.weight", "head.bias"} <= changed(before, state(model))


def test_planned_unfreezing_is_in_the_record_and_frozen_weights_were_watched_until_then() -> None:
    audit = TrainableParamAudit(table=False)
    model = seeded(RUNS["unfrozen in the module's third epoch"][0])
    trainer(audit, epochs=4).fit(model, loader())
    numbers = [moment.trainable for moment in audit.moments]
    whole = sum(p.numel() for p in model.parameters())
    head = sum(p.numel() for p in model.head.parameters())
    assert (numbers[0], numbers[-1]) == (head, whole)
    assert next(m.epoch for m in audit.moments if m.trainable == whole) == 2


def stepped(model: nn.Module, optimizer: Any) -> None:
    for x, y in loader():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


PLAIN: dict[str, Callable[[Any], list[Any]]] = {
    "SGD holds all": lambda m: list(m.parameters()),
    "SGD holds what trains": lambda m: [p for p in m.parameters() if p.requires_grad],
    "SGD holds the head in a group of its own": lambda m: [{"params": m.head.parameters()}],
}


@pytest.mark.parametrize("case", PLAIN)
def test_a_healthy_plain_loop_has_no_finding(case: str) -> None:
    model = seeded(Toy)
    freeze(model, "backbone")
    optimizer = torch.optim.SGD(PLAIN[case](model), lr=0.1)
    before = state(model)
    with assert_frozen(model):
        stepped(model, optimizer)
    assert audit_parameters(model, optimizer) == []
    assert changed(before, state(model)) == {"head.weight", "head.bias"}


# what may be meant so: told once, by name, and the fit goes on


class Pooled(Toy):
    """A pooler that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.pooler = nn.Linear(8, 8)


class Held(Toy):
    """Its last layer is held back in the first epochs, as DINO's `freeze_last_layer` does."""

    def on_after_backward(self) -> None:
        if self.current_epoch < 3:
            for parameter in self.head.parameters():
                parameter.grad = None


class Rarely(Toy):
    """A branch that is used every 15th step."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step % 15 == 14:
            loss = loss + self.branch(self.backbone(batch[0])).pow(2).mean()
        return loss


class Twelve(Toy):
    """Accumulates over 12 batches in a hook of its own."""

    def optimizer_step(self, epoch: Any, index: Any, optimizer: Any, closure: Any = None) -> None:
        closure()
        if self.trainer.fit_loop.total_batch_idx % 12 == 11:
            optimizer.step()

    def optimizer_zero_grad(self, *_: Any) -> None:
        if self.trainer.fit_loop.total_batch_idx % 12 == 0:
            super().optimizer_zero_grad(*_)


MEANT: dict[str, tuple[Callable[[], Toy], str, set[str]]] = {
    "an unused pooler": (Pooled, "no-gradient", {"pooler.weight", "pooler.bias"}),
    "a last layer held back": (Held, "no-gradient", {"head.weight", "head.bias"}),
    "a branch every 15th step": (Rarely, "no-gradient", {"branch.weight", "branch.bias"}),
    "own accumulation over 12 batches": (Twelve, "not-updated", {"head.weight", "head.bias"}),
}


@pytest.mark.parametrize("case", MEANT)
def test_what_may_be_meant_is_a_warning_once_that_names_tensors_and_options(case: str) -> None:
    make, code, names = MEANT[case]
    audit = TrainableParamAudit(table=False)
    with pytest.warns(UserWarning, match=code) as caught:
        trainer(audit, epochs=12).fit(seeded(make), loader(rows=36))
    told = [str(w.message) for w in caught if f"[{code}]" in str(w.message)]
    assert {f.severity for f in audit.findings} == {"warning"}
    assert names in [set(f.names) for f in audit.findings]
    assert len(told) == len(audit.findings) == len({f.names for f in audit.findings})
    assert all("dead_after" in text for text in told)
    ignoring = TrainableParamAudit(table=False, ignore=sorted(names))
    quiet = TrainableParamAudit(table=False, dead_after=40)
    for again in (ignoring, quiet):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer(again, epochs=12).fit(seeded(make), loader(rows=36))
        left = [f for f in again.findings if names.intersection(f.names)]
        assert left == [] or (again is quiet and case == "an unused pooler")


class Cut(Toy):
    """Its backbone's output is detached from the third epoch on."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.backbone(x)
        return self.head(hidden.detach() if self.current_epoch >= 2 else hidden)


class Nothing(Toy):
    """Its optimizer is never stepped."""

    def optimizer_step(self, epoch: Any, index: Any, optimizer: Any, closure: Any = None) -> None:
        closure()


class Cleared(Toy):
    """Nothing ever has a gradient when the optimizer steps."""

    def on_after_backward(self) -> None:
        self.zero_grad(set_to_none=True)


SERIOUS: dict[str, tuple[Callable[[], Toy], str]] = {
    "gradients stop for good": (Cut, r"no-gradient.*backbone.*had gradients"),
    "nothing is ever stepped": (Nothing, "not-updated"),
    "nothing ever has a gradient": (Cleared, "no-gradient"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SERIOUS)
def test_what_is_lost_for_good_ends_the_fit(case: str) -> None:
    make, match = SERIOUS[case]
    fit, model = trainer(TrainableParamAudit(table=False), epochs=6), seeded(make)
    with pytest.raises(AuditError, match=match):
        fit.fit(model, loader(rows=36))


class Flips(Callback):
    """Flips flags in the middle of an epoch, of one tensor, or of two parts in turn."""

    def __init__(self, hook: str, act: Callable[[Any], Any]) -> None:
        def run(trainer: Any, module: Any, *rest: Any) -> None:
            if trainer.global_step == (5 if "batch" in hook else 4):
                act(module)

        setattr(self, hook, run)


def swap(module: Any) -> None:
    module.backbone.blocks[0].requires_grad_(True)
    module.head.requires_grad_(False)


VIOLATIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "inside an epoch": ("on_train_batch_end", lambda m: m.backbone.requires_grad_(True)),
    "of a single tensor": (
        "on_train_epoch_start",
        lambda m: m.backbone.embed.weight.requires_grad_(True),
    ),
    "of two parts in turn": ("on_train_epoch_start", swap),
}


@pytest.mark.parametrize("case", VIOLATIONS)
def test_a_flip_that_is_no_declaration_stays_a_violation(case: str) -> None:
    audit = TrainableParamAudit(table=False, on_violation="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(Flips(*VIOLATIONS[case]), audit, epochs=3).fit(plain(by_hand), loader())
    assert "flag-changed" in {finding.code for finding in audit.findings}


def plain(make: Callable[[], Toy]) -> Toy:
    return seeded(lambda: plain_norms(make))  # type: ignore[no-any-return, arg-type]


def breaks(_: Any) -> None:
    raise RuntimeError("the user's own")


@pytest.mark.filterwarnings("ignore")
def test_an_audit_that_fails_never_replaces_the_users_own_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(self: AuditRun) -> None:
        raise TypeError("of the audit")

    monkeypatch.setattr(AuditRun, "last_words", fails)
    monkeypatch.setattr(AuditRun, "look_at_weights", fails)
    fit = trainer(
        FreezeBackbone(), TrainableParamAudit(table=False), At("on_train_batch_end", breaks)
    )
    model = seeded(Toy)
    with pytest.raises(RuntimeError, match="the user's own"):
        fit.fit(model, loader())


def test_a_buffer_that_is_no_tensor_any_more_is_told_as_gone() -> None:
    def act(module: Any) -> None:
        module.backbone.blocks[0].norm._buffers["running_mean"] = None

    audit = TrainableParamAudit(table=False, on_violation="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(FreezeBackbone(), At("on_train_epoch_end", act, 2), audit).fit(
            seeded(Toy), loader()
        )
    assert [(f.code, f.names) for f in audit.findings] == [
        ("frozen-buffer-changed", ("backbone.blocks.0.norm.running_mean",))
    ]
