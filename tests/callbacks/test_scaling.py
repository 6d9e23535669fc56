"""Work grows with the model as tensors do, and not with the steps; what is known is never stale."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader

from lightning_freeze import (
    FreezeBackbone,
    FrozenFeatureCache,
    GradualFreeze,
    GradualUnfreeze,
    TrainableParamAudit,
)
from lightning_freeze.callbacks.fit_state import fit_state_of
from lightning_freeze.engine.flags import Applier, quiet_modules
from lightning_freeze.engine.optimizers import OptimizerGroups
from lightning_freeze.model.discovery import rules
from lightning_freeze.model.index import Members, ModelIndex
from lightning_freeze.schedule.plan import FreezePlan
from tests.toys import Toy, loader, trainer


def calls(work: Callable[[], Any]) -> int:
    """How many functions, Python's and C's, are called in some work: the same on any machine."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    work()  # whatever is done once
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def growth(work: Callable[[Toy], Callable[[], Any]]) -> float:
    """By how much the calls grow where the model grows by four."""
    small, large = (calls(work(Toy(blocks=blocks))) for blocks in (60, 240))
    return large / small


WORDS: dict[str, Callable[[], Any]] = {
    "backbone": FreezeBackbone,
    "unfreeze": GradualUnfreeze,
    "written": lambda: GradualUnfreeze({0: "head", 1: "backbone"}),
    "freeze": GradualFreeze,
    "chain-thaw": GradualUnfreeze.chain_thaw,
}


@pytest.mark.parametrize("word", WORDS)
def test_index_and_plan_grow_as_the_model_does(word: str) -> None:
    callback = WORDS[word]()
    assert growth(lambda model: lambda: callback.resolve(ModelIndex.of(model)).plan(1)) < 5


def test_apply_and_sync_grow_as_the_model_does() -> None:
    def prepared(model: Toy) -> Callable[[], None]:
        index = ModelIndex.of(model)
        schedule = GradualUnfreeze().resolve(index)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        held = OptimizerGroups(index, [optimizer], {})
        applier = Applier(index, index.parameters)
        half = len(schedule.stages) // 2

        def switch() -> None:
            for stage in (half, half + 1):
                plan = schedule.plan(stage)
                applier.apply(plan)
                held.sync(plan.frozen)

        return switch

    assert growth(prepared) < 5


def test_quadratic_work_would_be_noticed() -> None:
    def squared(model: Toy) -> Callable[[], list[bool]]:
        names = [name for name, _ in model.named_parameters()]
        return lambda: [one.startswith(other) for one in names for other in names]

    assert growth(squared) > 10


@pytest.mark.parametrize("asleep", [False, True])
def test_the_start_of_a_fit_grows_as_the_model_does(asleep: bool) -> None:
    counted: list[int] = []
    for blocks in (20, 80):
        model = Toy(blocks=blocks).train(not asleep)
        callbacks = [FreezeBackbone("backbone.embed"), GradualUnfreeze(), TrainableParamAudit()]
        inside = Counter[str]()

        def note(frame: Any, event: str, argument: Any, inside: Counter[str] = inside) -> None:
            if event in ("call", "c_call") and "lightning_freeze" in frame.f_code.co_filename:
                inside["calls"] += 1

        fit = trainer(*callbacks, max_epochs=1, limit_train_batches=1)
        sys.setprofile(note)
        try:
            fit.fit(model, loader())
        finally:
            sys.setprofile(None)
        counted.append(inside["calls"])
    assert counted[1] / counted[0] < 5


def test_a_fit_is_searched_for_layers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Counter[str]()
    search, walk = rules._discover, Members.of.__func__  # type: ignore[attr-defined]

    def searched(index: ModelIndex) -> Any:
        seen["searches"] += 1
        return search(index)

    def walked(kind: Any, *given: Any) -> Any:
        seen["walks"] += 1
        return walk(kind, *given)

    class First(Callback):
        def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
            seen["walks before training"] = seen["walks"]

    monkeypatch.setattr(rules, "_discover", searched)
    monkeypatch.setattr(Members, "of", classmethod(walked))
    callbacks = [FreezeBackbone("backbone.embed"), GradualUnfreeze(), TrainableParamAudit()]
    trainer(*callbacks, First(), max_epochs=3).fit(Toy(), loader())
    assert seen["searches"] == 1
    assert seen["walks before training"] == 2
    assert seen["walks"] <= 3  # later one more, for what is no part of the model


def replaced(model: Toy) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def other_module(model: Toy) -> None:
    model.head = nn.Linear(8, 3)


def tied(model: Toy) -> None:
    model.backbone.blocks[1].linear.weight = model.backbone.blocks[0].linear.weight


def parametrized(model: Toy) -> None:
    parametrizations.weight_norm(model.backbone.blocks[0].linear)


def longer(model: Toy) -> None:
    model.backbone.blocks.append(type(model.backbone.blocks[0])(8))


def renamed(model: Toy) -> None:
    model.classifier, model.head = model.head, nn.Sequential(model.head)


def reordered(model: Toy) -> None:
    model.backbone.blocks = nn.ModuleList(reversed(model.backbone.blocks))


def of_another_class(model: Toy) -> None:
    kind = type(model.backbone.blocks[0])
    model.backbone.blocks[0].__class__ = type("Other", (kind,), {})


CHANGES = (
    replaced,
    other_module,
    tied,
    parametrized,
    longer,
    renamed,
    reordered,
    of_another_class,
)


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_from_before_isnt_used_for_a_model_that_changed(
    change: Callable[[Toy], None],
) -> None:
    model = Toy()
    known = ModelIndex.of(model)
    assert ModelIndex.of(model, known) is known
    change(model)
    now, fresh = ModelIndex.of(model, known), ModelIndex.of(model)
    assert now is not known
    assert now == fresh or now.parameters.keys() == fresh.parameters.keys()
    assert all(now.parameters[name] is p for name, p in fresh.parameters.items())
    assert now.canonical == fresh.canonical
    assert list(now.modules) == list(fresh.modules)
    assert all(now.within(m) == fresh.within(m) for m in fresh.modules.values())


class Late(Toy):
    """Changes behind the callbacks' `setup`."""

    def __init__(self, change: Callable[[Toy], None]) -> None:
        super().__init__()
        self.change = change
        self.made = False

    def configure_model(self) -> None:
        if not self.made:
            self.made = True
            self.change(self)


@pytest.mark.parametrize("change", [replaced, other_module, tied, parametrized, longer])
def test_a_model_that_changes_in_configure_model_is_frozen_as_it_is_then(
    change: Callable[[Toy], None],
) -> None:
    model = Late(change)
    seen: list[dict[str, Any]] = []

    class Look(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            fit = fit_state_of(trainer)
            assert fit is not None
            assert fit.index is not None
            seen.append(fit.index.parameters)

    trainer(GradualUnfreeze(start=1), Look(), max_epochs=1).fit(model, loader())
    now = ModelIndex.of(model)
    assert list(seen[0]) == list(now.parameters)
    assert all(seen[0][n] is p for n, p in now.parameters.items())
    trains = {name for name, p in now.parameters.items() if p.requires_grad}
    assert trains == {name for name in now.parameters if name.startswith("head")}


def test_what_a_module_holds_is_what_torch_says() -> None:
    model = Toy()
    tied(model)
    parametrized(model)
    index = ModelIndex.of(model)
    some = frozenset(list(index.parameters)[::3])
    found = {path: (inside, chosen) for path, inside, chosen in index.held(some)}
    assert list(found) == list(index.modules)
    for path, module in index.modules.items():
        inside = [index.name_of[id(p)] for p in module.parameters()]
        assert index.within(module) == tuple(inside)
        assert index.holds(module) == bool(inside)
        every = [index.canonical[n] for n in index.canonical if f"{n}.".startswith(f"{path}.")]
        every = every if path else list(index.canonical.values())
        assert found[path] == (
            len(every),
            len(some.intersection(every) and [*filter(some.__contains__, every)]),
        )


@pytest.mark.parametrize("lively", [False, True])
def test_quiet_modules_are_those_of_which_all_is_frozen(lively: bool) -> None:
    model = Toy(blocks=4)
    index = ModelIndex.of(model)
    norms = {p for p, m in index.modules.items() if lively and isinstance(m, nn.BatchNorm1d)}
    own = {name for path in norms for name in index.within(index.modules[path])}
    frozen = frozenset(n for n in index.parameters if n.startswith("backbone.blocks.1")) - own
    quiet = quiet_modules(index, FreezePlan(frozen, frozen, frozenset(norms)))
    block = "backbone.blocks.1"
    expected = [block, f"{block}.linear", f"{block}.norm", f"{block}.dropout"]
    assert quiet == [path for path in expected if path not in norms]


class Held(Callback):
    """What Python's objects take after some steps."""

    def __init__(self, at: tuple[int, ...], *, hoard: bool = False) -> None:
        self.at = at
        self.hoard: list[bytes] | None = [] if hoard else None
        self.bytes_held: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if self.hoard is not None:
            self.hoard.append(bytes(200))
        if trainer.global_step in self.at:
            gc.collect()
            self.bytes_held.append(tracemalloc.get_traced_memory()[0])


@pytest.mark.slow
@pytest.mark.parametrize("hoard", [False, True])
def test_no_hook_grows_with_the_number_of_steps(hoard: bool) -> None:
    held = Held((50, 200, 350, 500), hoard=hoard)
    callbacks = [
        FreezeBackbone("backbone.embed"),
        GradualUnfreeze(),
        FrozenFeatureCache(),
        TrainableParamAudit(table=False, every=20),
        held,
    ]
    samples = [*loader(batch=1).dataset] * 500
    batches = DataLoader(samples, batch_size=6)
    tracemalloc.start()
    try:
        trainer(*callbacks, max_epochs=1, max_steps=500).fit(Toy(), batches)
    finally:
        tracemalloc.stop()
    # what is made once, or at most so many times, falls into one of these; what grows, into all
    grown = min(after - before for before, after in pairwise(held.bytes_held))
    assert (grown > 30_000) if hoard else (grown < 15_000)
